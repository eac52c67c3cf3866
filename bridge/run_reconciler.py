"""给死了的运行收尾，给没人做的运行敲门：工人各自按时看一眼，一次只有一个在看。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import NAMESPACE_OID, uuid5

import sqlalchemy as sa
from dagster import DagsterError, DagsterRun, DagsterRunStatus

from bridge.dagster_adapter import enqueue, has_begun, scope_of, unfinished_runs
from bridge.errors import is_transient
from bridge.run_lanes import EVENT, LANE_TAG, RETRY_TAG, TRIGGER_TAG, lane_of
from bridge.run_worker import RunWorker, hold_cancelled_days, record_failed_run
from bridge.settings import Lane
from bridge.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.services import leases, ledger
from etl_assets.services.readiness import assert_writable

logger = get_logger(__name__)

_cannot_bury = RepeatedWarning(logger, "cannot bury a dead run, looking after the others", level="error")

INTERVAL_SECONDS = 3.0
QUIET_SECONDS = 5.0
"""刚有动静的运行不看：敲过的门铃多半正在路上。"""
MAX_RETRIES = 3

_WAITING = (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING)
_ONE_AT_A_TIME = 0x65746C52  # "etlR"


@dataclass(frozen=True)
class Ring:
    """该敲的一次门：任务、车道、参数。"""

    task_name: str
    lane: Lane
    arguments: tuple[str, ...] = ()


def reconcile_runs(worker: RunWorker) -> list[Ring]:
    """死了的标成失败并重来，没人要的取消收尾；返回该敲的门。

    :raises DatabaseRefusedError: 数据库只读：没有谁续得了租，过期的不就是死的。
    """
    with translated_errors(), worker.engine.begin() as guard:
        assert_writable(guard)
        if not guard.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_ONE_AT_A_TIME))):
            return []
        return [*_bury_expired(worker), *_look_after_unheld(worker)]


def count_unfinished(worker: RunWorker) -> Counter[Lane]:
    """每条车道上没有结束的运行：每个至多该有一条消息。"""
    return Counter(lane_of(run) for run in unfinished_runs(worker.instance, tag=LANE_TAG))


def _bury_expired(worker: RunWorker) -> Iterator[Ring]:
    with translated_errors(), worker.engine.connect() as connection:
        expired = leases.read_expired_leases(connection, worker.settings.target_schema)
    for run_id, is_cancelled in expired:
        yield from _alone(run_id, _bury_leased(worker, run_id, is_cancelled=is_cancelled))


def _bury_leased(worker: RunWorker, run_id: str, *, is_cancelled: bool) -> Iterator[Ring]:
    run = worker.instance.get_run_by_id(run_id)
    if run is not None and run.status is not DagsterRunStatus.SUCCESS and (is_cancelled or _is_cancelled(run)):
        _bury_cancelled(worker, run, "Cancelled; its worker died before it stopped.", was_begun=True)
    elif run is not None and not run.is_finished:
        yield from _bury(worker, run)
        return
    elif run is not None and run.status is DagsterRunStatus.FAILURE:
        _record(worker, run, "This run failed and its worker died before it had written that down; the run's page says why it failed.")
    else:  # 领了日子、还没建运行就死了，或者刚做完就死了
        with translated_errors(), worker.engine.begin() as connection:
            leases.delete_expired_lease(connection, run_id)
    yield Ring(MATERIALIZE_DUE, "event")


def _look_after_unheld(worker: RunWorker) -> Iterator[Ring]:
    """没有租约的运行。等着的敲门，多敲一次也无妨；别的读过租约再读一次：刚结束的不会被当成死的。"""
    candidates = unfinished_runs(worker.instance, tag=LANE_TAG, quiet_seconds=QUIET_SECONDS)
    if not candidates:
        return
    with translated_errors(), worker.engine.connect() as connection:
        held = leases.leased_run_ids(connection)
    for run in candidates:
        if run.run_id in held:
            continue
        if run.status in _WAITING:
            yield Ring(EXECUTE_RUN, lane_of(run), (run.run_id,))
        else:
            yield from _alone(run.run_id, _bury_unheld(worker, run.run_id))


def _bury_unheld(worker: RunWorker, run_id: str) -> Iterator[Ring]:
    run = worker.instance.get_run_by_id(run_id)
    if run is None or run.is_finished or run.status in _WAITING:
        return
    if _is_cancelled(run):
        was_begun = _is_of_event(run) or has_begun(worker.instance, run_id)
        _bury_cancelled(worker, run, "Cancelled while no worker was executing it.", was_begun=was_begun)
    else:
        yield from _bury(worker, run)


def _alone(run_id: str, burial: Iterator[Ring]) -> list[Ring]:
    """一个运行收不了尾，别的还要照看。"""
    try:
        return list(burial)
    except Exception as error:
        if is_transient(error):
            raise
        _cannot_bury.say(run_id, run_id=run_id, exc_info=error)
        return []


def _bury(worker: RunWorker, run: DagsterRun) -> Iterator[Ring]:
    """工人死了的运行：重来没做完的资产，在网页上与它相连；它标成失败，发失败的完成事件。

    收尾的工人也会死在半路：先有重来的运行，再标失败，租约最后才删；下一个收尾的从头再来，做过的不再做一遍。
    """
    logger.warning("worker died in mid-run", run_id=run.run_id)
    retry = None if _is_of_event(run) else _queue_retry(worker, run)
    message = "The worker of this run died or was cut off; what it had not committed is undone, the unfinished assets are run again."
    worker.instance.report_run_failed(run, message)
    _record(worker, run, message)
    if _is_of_event(run):
        yield Ring(MATERIALIZE_DUE, "event")
    elif retry is not None:
        yield Ring(EXECUTE_RUN, lane_of(run), (retry.run_id,))


def _bury_cancelled(worker: RunWorker, run: DagsterRun, message: str, *, was_begun: bool) -> None:
    """人取消了，做它的工人却死了：没做成的日子照样搁置，像工人活着那样。先搁置，租约最后才删。

    在队列里就取消的不搁置：没有人做过它，那些天也不是它要的。
    """
    scope, target = scope_of(run), worker.settings.target_schema
    if scope.assets and scope.days and was_begun:
        with translated_errors(), worker.engine.begin() as connection:
            hold_cancelled_days(connection, target, scope.assets, scope.days, run_id=run.run_id)
    if not run.is_finished:
        worker.instance.report_run_canceled(run, message)
    with translated_errors(), worker.engine.begin() as connection:
        leases.delete_expired_lease(connection, run.run_id)


def _queue_retry(worker: RunWorker, run: DagsterRun) -> DagsterRun | None:
    """重来的运行，至多接着来几次：会杀死工人的运行不能永远重来。编号由死了的那个定，所以只有一个。"""
    retries = int(run.tags.get(RETRY_TAG, "0"))
    if retries >= MAX_RETRIES:
        return None
    retry_id = str(uuid5(NAMESPACE_OID, f"retry of {run.run_id}"))
    tags = {RETRY_TAG: str(retries + 1), LANE_TAG: lane_of(run)}
    try:
        retry = worker.instance.get_run_by_id(retry_id) or worker.location.create_retry(worker.instance, run, run_id=retry_id, tags=tags)
    except DagsterError as error:  # 我们的代码里没有它的资产：它照样失败，别的运行还要照看
        logger.error("cannot run it again with the code of this worker", run_id=run.run_id, error=str(error))
        return None
    if retry is not None and retry.status is DagsterRunStatus.NOT_STARTED:
        enqueue(worker.instance, retry)
    return retry


def _record(worker: RunWorker, run: DagsterRun, message: str) -> None:
    """失败的完成事件；事件要的日子由台账重来（领它的人接着这个运行）。租约在同一事务里删去：还有租约的，就还没记下。"""
    scope, target = scope_of(run), worker.settings.target_schema
    with translated_errors(), worker.engine.begin() as connection:
        if scope.assets and scope.days:
            record_failed_run(connection, target, scope.days, asset=scope.assets[0], run_id=run.run_id, error=message)
        if scope.assets and scope.days and _is_of_event(run):
            ledger.record_failure(
                connection, target, scope.assets, scope.days, reason=message, kind="unknown", run_id=run.run_id, first_retry_seconds=0
            )
        leases.delete_expired_lease(connection, run.run_id)


def _is_cancelled(run: DagsterRun) -> bool:
    return run.status in (DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED)


def _is_of_event(run: DagsterRun) -> bool:
    return run.tags.get(TRIGGER_TAG) == EVENT
