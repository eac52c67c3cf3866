"""给死了的运行收尾，给没人做的运行敲门：工人各自按时看一眼，一次只有一个在看。"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from uuid import NAMESPACE_OID, uuid5

import sqlalchemy as sa
from dagster import DagsterError, DagsterRun, DagsterRunStatus

from bridge.errors import is_transient
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs.lanes import LANE_TAG, RETRY_TAG, is_of_event, lane_of
from bridge.runs.worker import RunWorker, record_failed_run, trigger_of
from bridge.settings import Lane
from bridge.warm_dagster.runs import enqueue, has_begun, scope_of, unfinished_runs
from etl_assets.core import metrics
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import TransientError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.ledger import leases
from etl_assets.ledger.failures import hold_days, record_failure, unfinished_assets
from etl_assets.orchestration.run_tags import read_tag, renamed
from etl_assets.reports.readiness import assert_writable

logger = get_logger(__name__)

_cannot_bury = RepeatedWarning(logger, "cannot bury a dead run, looking after the others", level="error")

INTERVAL_SECONDS = 3.0
QUIET_SECONDS = 5.0
"""刚有动静的运行不看：敲过的门铃多半正在路上。"""
MAX_RETRIES = 3
_AT_ONCE = Backoff(first_seconds=0.0, longest_seconds=0.0)
"""工人死了不是日子的错：马上重来，只是计次数。"""

_WAITING = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_ONE_AT_A_TIME = 0x65746C52  # "etlR"
_DIED = "The worker of this run died or was cut off; what it had not committed is undone, the unfinished assets are run again."


@dataclass(frozen=True)
class Ring:
    """该敲的一次门：任务、车道、参数。"""

    task_name: str
    lane: Lane
    arguments: tuple[str, ...] = ()
    unfinished: int | None = field(default=None, compare=False)
    """那条车道上没有结束的运行，每个至多该有一条消息；None 是头一次敲，不论有几条。"""


def reconcile_runs(worker: RunWorker, *, due_at: float | None = None) -> list[Ring]:
    """死了的标成失败并重来，没人要的取消收尾；返回该敲的门。

    一次一个在看只是省事：看着的停顿久了，别人也会来看。谁记下收尾，由记它的那个事务自己挡着。

    :param due_at: 这一次本该开始的时刻（time.monotonic）。
    :raises DatabaseRefusedError: 数据库只读：没有谁续得了租，过期的不就是死的。
    :raises TransientError: 到现在才读到租约：停顿的时候，活着的也续不了租。
    """
    with translated_errors(), worker.engine.begin() as guard:
        assert_writable(guard)
        # 只试，不排队：前一个刚看完，接着再看一遍没有用处
        if not guard.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_ONE_AT_A_TIME))):
            return []
        expired = leases.read_expired_leases(guard, worker.settings.target_schema)
        # 读到了才量：停顿也许正落在读租约的那一句里
        _assert_no_pause(worker, due_at)
        burials = (
            _alone(run_id, _bury_leased(worker, run_id, is_cancelled=is_cancelled)) for run_id, is_cancelled in expired
        )
        return [*chain.from_iterable(burials), *_look_after_unleased(worker)]


def _assert_no_pause(worker: RunWorker, due_at: float | None) -> None:
    paused_seconds = time.monotonic() - due_at if due_at is not None else 0.0
    if paused_seconds > worker.lease_seconds / 2:
        raise TransientError(
            f"the database or this process paused for {paused_seconds:.1f} s: living runs get time to settle"
        )


def _bury_leased(worker: RunWorker, run_id: str, *, is_cancelled: bool) -> Iterator[Ring]:
    """租约最后才删：收尾的死在半路，下一个从头再来。"""
    run = worker.instance.get_run_by_id(run_id)
    if run is None or run.status is DagsterRunStatus.SUCCESS:  # 领了日子、还没建运行就死了，或者刚做完就死了
        _delete_lease(worker, run_id, ended=None if run is None else (run, "success"))
    elif is_cancelled or _is_cancelled(run):
        if not run.is_finished:
            worker.instance.report_run_canceled(run, "Cancelled; its worker died before it stopped.")
        _delete_lease(worker, run_id, lambda connection: _hold(connection, worker, run), ended=(run, "canceled"))
    elif run.status is DagsterRunStatus.FAILURE:
        message = (
            "This run failed and its worker died before it had written that down; the run's page says why it failed."
        )
        record = partial(_record, worker=worker, run=run, message=message)
        _delete_lease(worker, run_id, record, ended=(run, "failure"))
    elif not is_of_event(run) and not has_begun(worker.instance, run_id):
        # 拿到手，还没开始做：它照样排着队；它的消息也许已经确认了
        _delete_lease(worker, run_id)
        yield Ring(EXECUTE_RUN, lane_of(run), (run_id,))
    else:
        rings = _fail(worker, run)
        record = partial(_record, worker=worker, run=run, message=_DIED)
        _delete_lease(worker, run_id, record, ended=(run, "failure"))
        yield from rings
        return
    yield Ring(MATERIALIZE_DUE, "event")


def _delete_lease(
    worker: RunWorker,
    run_id: str,
    record: Callable[[sa.Connection], None] | None = None,
    *,
    ended: tuple[DagsterRun, metrics.RunOutcome] | None = None,
) -> None:
    """删得到租约的才记，在同一事务里：收尾收了一半停住的，醒来时别人已经收完，不再记一次。

    :param ended: 它就此结束的运行，与结局；还要再排队的、没有建过的没有。
    """
    with translated_errors(), worker.engine.begin() as connection:
        is_ours = leases.delete_expired_lease(connection, run_id)
        if is_ours and record is not None:
            record(connection)
    if is_ours:
        metrics.lease_lost()
        if ended is not None:
            metrics.run_ended(trigger_of(ended[0]), ended[1])


def _look_after_unleased(worker: RunWorker) -> Iterator[Ring]:
    """没有租约的运行。等着的敲门，多敲一次也无妨；别的读过租约再读一次：刚结束的不会被当成死的。"""
    # 先读运行，后读租约：反过来，两次之间被接手的看着像没有租约却在做，活着就给埋了
    records = unfinished_runs(worker.instance, tag=LANE_TAG)
    unfinished = Counter(lane_of(record.dagster_run) for record in records)
    quiet_since = datetime.now(UTC) - timedelta(seconds=QUIET_SECONDS)
    candidates = [record.dagster_run for record in records if record.update_timestamp < quiet_since]
    if not candidates:
        return
    leased = transact(worker.engine, leases.leased_run_ids)
    for run in candidates:
        if run.run_id in leased:
            continue
        if run.status in _WAITING:
            yield Ring(EXECUTE_RUN, lane_of(run), (run.run_id,), unfinished[lane_of(run)])
        else:
            yield from _alone(run.run_id, _bury_unleased(worker, run.run_id))


def _bury_unleased(worker: RunWorker, run_id: str) -> Iterator[Ring]:
    """没有租约可删：锁住它，再看一遍它的状态，在同一事务里记下；没提交的，锁与记下的一起没有了。"""
    with translated_errors(), worker.engine.begin() as connection:
        if not connection.scalar(
            sa.select(sa.func.pg_try_advisory_xact_lock(_ONE_AT_A_TIME, sa.func.hashtext(run_id)))
        ):
            return
        run = worker.instance.get_run_by_id(run_id)
        if run is None or run.is_finished or run.status in _WAITING:
            return
        if not _is_cancelled(run):
            rings = _fail(worker, run)
            _record(connection, worker, run, _DIED)
            yield from rings
            return
        # 在队列里就取消的不搁置：没有人做过它，那些天也不是它要的
        if is_of_event(run) or has_begun(worker.instance, run_id):
            _hold(connection, worker, run)
        worker.instance.report_run_canceled(run, "Cancelled while no worker was executing it.")


def _alone(run_id: str, burial: Iterator[Ring]) -> list[Ring]:
    """一个运行收不了尾，别的还要照看。"""
    try:
        return list(burial)
    except Exception as error:
        if is_transient(error):
            raise
        _cannot_bury.say(type(error).__name__, run_id=run_id, exc_info=error)
        return []


def _fail(worker: RunWorker, run: DagsterRun) -> list[Ring]:
    """工人死了的运行标成失败；没做完的资产重来，在网页上与它相连。先有重来的，再标失败：死在半路的，下一个接着收尾。"""
    logger.warning("worker died in mid-run", run_id=run.run_id)
    retry = None if is_of_event(run) else _queue_retry(worker, run)
    worker.instance.report_run_failed(run, _DIED)
    if is_of_event(run):
        return [Ring(MATERIALIZE_DUE, "event")]
    return [Ring(EXECUTE_RUN, lane_of(run), (retry.run_id,))] if retry is not None else []


def _queue_retry(worker: RunWorker, run: DagsterRun) -> DagsterRun | None:
    """重来的运行，至多接着来几次：会杀死工人的运行不能永远重来。编号由死了的那个定，所以只有一个。"""
    retries = int(read_tag(run.tags, RETRY_TAG) or 0)
    if retries >= MAX_RETRIES:
        return None
    retry_id = str(uuid5(NAMESPACE_OID, f"retry of {run.run_id}"))
    tags = renamed(run.tags, {RETRY_TAG: str(retries + 1), LANE_TAG: lane_of(run)})
    try:
        retry = worker.instance.get_run_by_id(retry_id) or worker.location.create_retry(
            worker.instance, run, run_id=retry_id, tags=tags
        )
    except DagsterError as error:  # 我们的代码里没有它的资产：它照样失败，别的运行还要照看
        logger.error("cannot run it again with the code of this worker", run_id=run.run_id, error=str(error))
        return None
    # 也许不是这回建的：上一个收尾的建好了它，还没让它排队就死了
    if retry is not None and retry.status is DagsterRunStatus.NOT_STARTED:
        enqueue(worker.instance, retry)
    return retry


def _record(connection: sa.Connection, worker: RunWorker, run: DagsterRun, message: str) -> None:
    """失败的完成事件，除非数据都提交了；事件要的日子由台账重来（领它的人接着这个运行）。"""
    scope, target = scope_of(run, worker.location.graph), worker.settings.target_schema
    if not scope.assets or not scope.days:
        return
    if is_of_event(run):
        # kind 是 unknown，算一次失败：也许正是这些天杀死了工人，不能没完没了地重来
        unfinished = record_failure(
            connection,
            target,
            scope.assets,
            scope.days,
            reason=message,
            kind="unknown",
            run_id=run.run_id,
            backoff=_AT_ONCE,
        )
    else:
        unfinished = unfinished_assets(connection, target, run.run_id, scope.assets, scope.days)
    if unfinished:
        record_failed_run(connection, target, scope.days, asset=unfinished[0], run_id=run.run_id, error=message)


def _hold(connection: sa.Connection, worker: RunWorker, run: DagsterRun) -> None:
    """人取消了，做它的工人却死了：没做成的日子照样搁置，像工人活着那样。"""
    scope = scope_of(run, worker.location.graph)
    if scope.assets and scope.days:
        hold_days(connection, worker.settings.target_schema, scope.assets, scope.days, cancelled=run.run_id)


def _is_cancelled(run: DagsterRun) -> bool:
    return run.status in (DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED)
