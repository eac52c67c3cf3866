"""一个工人进程里常驻的东西：载入一次的代码位置、Dagster 实例、引擎；把到期的日子与网页来的运行执行到底。"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TypeVar
from uuid import uuid4

import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from bridge.errors import CodeLocationError, is_transient, tolerate
from bridge.runs.lanes import is_of_event
from bridge.runs.run_tags import tags_of_claim
from bridge.settings import BridgeSettings
from bridge.warm_dagster.code_location import CodeLocation, RunFailure, RunResult
from bridge.warm_dagster.code_location_name import CODE_MODULE, JOB_NAME, LOCATION_NAME
from bridge.warm_dagster.instance import flush_events, open_instance
from bridge.warm_dagster.runs import report_starting, scope_of
from etl_assets.core import metrics
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import fault_of, translated_errors
from etl_assets.core.database_sync import autocommitting, build_engine, get_engine, transact
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, EtlError, LeaseLostError
from etl_assets.core.interruption import Interruption, current_interruption
from etl_assets.core.log import RepeatedWarning, get_logger, process_name
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.core.tracing import span
from etl_assets.ledger import leases
from etl_assets.ledger.claims import Claim, claim_due_days
from etl_assets.ledger.failures import hold_days, note_failed_run, record_failure, unfinished_assets
from etl_assets.ledger.graph import read_graph, write_graph
from etl_assets.ledger.leases import Lease, LeaseState, current_lease
from etl_assets.ledger.marking import waiting_imports
from etl_assets.ledger.outbox import Completion, add_completion
from etl_assets.reports.lookups import find_index_work
from etl_assets.reports.readiness import assert_runnable, assert_writable

logger = get_logger(__name__)

Result = TypeVar("Result")

_INSIST_SECONDS = 1.0
# 只数数据库明明好着的那几次（`_is_of_this_run`）；它真的不在、不让写，等多久都等
_ATTEMPTS = 5

_cannot_record = RepeatedWarning(logger, "cannot record how the run ended, trying again")
_cannot_extend = RepeatedWarning(logger, "cannot extend the lease")


@dataclass(frozen=True)
class TakenRun:
    """手里的一个运行：assets 是它要做的资产，上游在前；days 是它的日子，没有分区的运行是 None。"""

    run: DagsterRun
    lease: Lease
    assets: tuple[str, ...]
    days: DayRange | None
    interruption: Interruption = field(default_factory=Interruption)
    traceparents: Sequence[str] = ()
    """要求它的事件的 trace：它接着头一个，与别的相连。"""
    ended: threading.Event = field(default_factory=threading.Event)
    """做完了，正在放下租约：此后它不在了，不是归了别人。"""


@dataclass(frozen=True)
class RunWorker:
    """阻塞的部分；任务用 asyncio.to_thread 调它们。"""

    instance: DagsterInstance
    location: CodeLocation
    engine: sa.Engine
    settings: EtlSettings
    lease_seconds: float
    owner: str = field(default_factory=process_name)
    refused: threading.Event = field(default_factory=threading.Event)
    """上一个运行做不成，因为数据库不让做：看过它让做了，才领下一段。"""

    @classmethod
    def load(cls, bridge_settings: BridgeSettings) -> RunWorker:
        """载入代码位置，连上 Dagster 的存储，把作业先算一遍：第一个事件就走热的路。

        :raises CodeLocationError: 代码有错。
        :raises DatabaseRefusedError: 缺表，或者只读。
        """
        # 先看表再载入代码：数据库不让做时，两秒来一次，不必每次都白载入一遍
        transact(get_engine(), assert_runnable, get_settings().target_schema)
        _warn_of_missing_indexes()
        instance = open_instance()
        worker = cls(
            instance=instance,
            location=_load_code(instance),
            engine=get_engine(),
            settings=get_settings(),
            lease_seconds=bridge_settings.lease_seconds,
        )
        worker.write_graph()
        # 载入的代码有上百万个对象，一次完整的垃圾回收就是 0.1 秒：它们不会死，以后不再看
        # 先收再冻：冻住的垃圾再也收不回来
        gc.collect()
        gc.freeze()
        return worker

    @cached_property
    def heartbeats(self) -> sa.Engine:
        """心跳自己的一个连接：运行用光了连接池、池里的连接哑了，都不碍它；没有回音的，租约到期之前来得及在新的连接上再试。"""
        seconds = self.lease_seconds / 3
        own = self.settings.model_copy(update={"pool_size": 1, "connect_timeout_seconds": max(2, int(seconds))})
        return build_engine(own, longest_wait_seconds=seconds)

    def write_graph(self) -> None:
        """载入的代码里的图从没写下过，就写下它：台账从此走它。"""
        with translated_errors(), self.engine.begin() as connection:
            if write_graph(connection, self.settings.target_schema, self.location.graph, if_new=True):
                logger.info("wrote down the assets of this code", assets=list(self.location.graph.names))
            elif read_graph(connection, self.settings.target_schema) != self.location.graph:
                remedy = "while old and new workers run that is as it should be; else let `etl init-db` of this code write them down"
                logger.warning(
                    "the ledger has other assets than this code", assets=list(self.location.graph.names), remedy=remedy
                )

    # ---- 拿到手 -----------------------------------------------------------------

    def claim(self, *, small: bool = False) -> Claim | None:
        """领一段到期的日子。

        :param small: 只领只有几次小导入等着的。
        :raises DatabaseRefusedError: 领了也做不成；那些日子不动，不必一天失败一个运行。
        """
        with translated_errors(), autocommitting(self.engine) as connection:
            if self.refused.is_set():
                assert_runnable(connection, self.settings.target_schema)
                self.refused.clear()
            return claim_due_days(
                connection,
                self.settings.target_schema,
                run_id=str(uuid4()),
                owner=self.owner,
                lease_seconds=self.lease_seconds,
                small=small,
                # 升级到一半，台账里已有新的资产：做不了的不领，留给有它们的工人
                known=self.location.graph.names,
            )

    def check_database(self) -> None:
        """:raises EtlError: 数据库还不在，或者还写不了。"""
        transact(self.engine, assert_writable)

    def start(self, claim: Claim, traceparents: Sequence[str] = ()) -> TakenRun:
        """给领到的日子建一个运行；标签说是哪些事件要的，它们的 trace。"""
        with self._extending(claim.lease):
            run = self.location.create_run(
                self.instance,
                job_name=JOB_NAME,
                run_id=claim.lease.run_id,
                assets=claim.assets,
                days=claim.days,
                tags=tags_of_claim(claim, traceparents),
                retry_of=claim.retry_of,
            )
        return TakenRun(run=run, lease=claim.lease, assets=claim.assets, days=claim.days, traceparents=traceparents)

    def take(self, run_id: str) -> TakenRun | None:
        """接手队列里的一个运行；结束了的、取消了的、别人正在做的是 None。

        先拿租约再看状态，取消的一方先标状态再看租约：两边总有一边看见另一边。
        """
        run = self.instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return None
        scope = scope_of(run, self.location.graph)
        with translated_errors(), autocommitting(self.engine) as connection:
            lease = leases.acquire_lease(
                connection,
                self.settings.target_schema,
                scope.days,
                run_id=run_id,
                owner=self.owner,
                lease_seconds=self.lease_seconds,
            )
        # 过期的租约也算有人：要等收尾的删去它，重来的运行才知道自己接着谁
        if lease is None:
            return None
        with self._extending(lease):
            try:
                run = self._begin(run_id)
                if run is not None and run.status is DagsterRunStatus.STARTING:
                    return TakenRun(run=run, lease=lease, assets=scope.assets, days=scope.days)
                if (
                    # 放得下才由我们来说取消：早已不是我们的，收尾的人会说
                    self._release(lease) is not LeaseState.LOST
                    and run is not None
                    and run.status is DagsterRunStatus.CANCELING
                ):
                    self.instance.report_run_canceled(run, "Cancelled before a worker began to execute it.")
            except Exception:
                with contextlib.suppress(EtlError):  # 还不了的会过期
                    self._release(lease)  # 留着它，重投的消息就当有人在做
                raise
        return None

    def _begin(self, run_id: str) -> DagsterRun | None:
        """还等着的标成 STARTING，再读一遍：读与标之间停住过的，别人也许已经收了场。"""
        run = self.instance.get_run_by_id(run_id)
        if run is None or run.status not in (
            DagsterRunStatus.QUEUED,
            DagsterRunStatus.NOT_STARTED,
            DagsterRunStatus.STARTING,
        ):
            return run
        report_starting(self.instance, run)
        return self.instance.get_run_by_id(run_id)

    @contextmanager
    def _extending(self, lease: Lease) -> Iterator[None]:
        """期间照样续租：Dagster 的表被锁住（建索引、迁移）时，写一个事件就要等很久。"""
        over = threading.Event()

        def extend() -> None:
            while not over.wait(self.lease_seconds / 3):
                if self._is_lost(lease):
                    return

        threading.Thread(target=extend, name="extend-lease", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    # ---- 执行 -------------------------------------------------------------------

    def execute(self, taken: TakenRun) -> RunResult:
        """在本线程里执行、释放租约；到期的日子失败了记进台账，由台账决定何时再试。"""
        tokens = current_lease.set(taken.lease), current_interruption.set(taken.interruption)
        try:
            # 停得比租约久：RUN_START 也不写，同一个运行也许别人正在做、做完了
            if not taken.lease.is_fresh() and self._is_lost(taken.lease):
                raise LeaseLostError(taken.run.run_id)
            with span(
                "run",
                parent=next(iter(taken.traceparents), None),
                links=taken.traceparents[1:],
                run_id=taken.run.run_id,
            ):
                result = self.location.execute_run(self.instance, taken.run)
        except Exception as error:  # noqa: BLE001  # 代码位置里没有的作业、坏了的快照：运行失败，工人还在
            failure = error  # except 块结束时 error 就没了
            result = self._insist(lambda: self._fail(taken, failure))
        finally:
            current_lease.reset(tokens[0])
            current_interruption.reset(tokens[1])
        if any(failure.kind == "refused" for failure in result.failures):
            self.refused.set()
        # 先说做完了再放租约：反过来，心跳看见租约没了，以为归了别人，就来打断收尾
        taken.ended.set()
        self._insist(lambda: self._finish(taken, result, "The cancellation arrived after the work was done."))
        return result

    def heartbeat(self, lease: Lease) -> LeaseState:
        """续租；看有没有人要取消。不碰 Dagster 的表：那里的锁与故障不关租约的事。"""
        with translated_errors(), autocommitting(self.heartbeats) as connection:
            return leases.extend_lease(connection, lease, lease_seconds=self.lease_seconds)

    def _is_lost(self, lease: Lease) -> bool:
        """续一次租；续不了的说一声，当它还在：租约真没了，数据有栅栏挡着。"""
        try:
            return self.heartbeat(lease) is LeaseState.LOST
        except Exception as error:  # noqa: BLE001  # 续不了的原因不论
            _cannot_extend.say(type(error).__name__, run_id=lease.run_id, error=str(error))
            return False

    def flush_events(self) -> None:
        """到此为止的日志写给网页看；可能要等锁，等多久不一定。"""
        with translated_errors():
            flush_events(self.instance)

    def note_cancel(self, taken: TakenRun) -> None:
        """取消的请求可能正赶上我们标 STARTED，被盖掉了：补上，Dagster 才以 CANCELED 收场。"""
        run = self.instance.get_run_by_id(taken.run.run_id)
        if run is not None and not run.is_finished and run.status is not DagsterRunStatus.CANCELING:
            self.instance.report_run_canceling(run)

    def abandon(self, taken: TakenRun, *, grace_seconds: float) -> None:
        """取消了却停不下来的运行：收回租约，它再也提交不了；进程随后换掉。"""
        message = f"Cancelled; it did not stop within {grace_seconds:g} s (ETL_CANCEL_GRACE_SECONDS), so its worker process is replaced."
        self._finish(taken, None, message)

    def _insist(self, step: Callable[[], Result]) -> Result:
        """收尾时数据库走开了、不让写、磁盘满了、行锁着：等它。丢下不管，租约会过期，别人当我们死了，算那些日子失败一次。"""
        attempts = _ATTEMPTS
        while True:
            try:
                return step()
            except Exception as error:
                tolerate(error, _cannot_record)
                attempts -= self._is_of_this_run(error)
                if not attempts:
                    raise
            time.sleep(_INSIST_SECONDS)

    def _is_of_this_run(self, error: Exception) -> bool:
        """连得上、让写，它却说连不上、不让写：坏的只是这个运行的什么，不能一直占着工人。锁、磁盘、连接数不在此列，会过去。"""
        if not isinstance(fault_of(error), DatabaseUnavailableError | DatabaseRefusedError):
            return False
        try:
            self.check_database()
        except EtlError:
            return False
        return True

    def _fail(self, taken: TakenRun, error: Exception) -> RunResult:
        """租约没了的由收尾的人说；还没开始的例外：他们来的时候还没有它。"""
        run_id = taken.run.run_id
        logger.exception("run failed outside its steps", run_id=run_id)
        error = fault_of(error) or error
        remedy = (
            "A server was away or refused; days that are still due are made again by themselves."
            if is_transient(error)
            else "If the code was changed, restart the workers and the code location so that they have the same, and launch it again."
        )
        message = f"The worker could not execute this run: {type(error).__name__}: {error}. {remedy}"
        current = self.instance.get_run_by_id(run_id)
        is_lost = self._is_lost(taken.lease)
        if (
            current is not None
            and not current.is_finished
            and (current.status is DagsterRunStatus.NOT_STARTED or not is_lost)
        ):
            self.instance.report_run_failed(current, message)
        kind = error.kind if isinstance(error, EtlError) else "unknown"
        return RunResult((RunFailure(None, kind, message),))

    def _finish(self, taken: TakenRun, result: RunResult | None, if_cancelled: str) -> None:
        """释放租约，同一事务里记下没做成的日子；租约早已不是我们的，就什么也不记，新的持有者会做。

        :param result: None 表示还没结束就放手。
        :param if_cancelled: 有人要取消它，网页上怎么说。取消来得太晚时，CANCELING 会盖掉 SUCCESS，没有别人来收尾。
        """
        if taken.days is None or not taken.assets or (result is not None and result.succeeded):
            state = self._release(taken.lease)
        else:
            with translated_errors(), self.engine.begin() as connection:
                # 放下就是删去那一行：何时占有的，要先读出来
                began_at = leases.read_acquired_at(connection, taken.lease) if result is not None else None
                state = leases.release_lease(connection, taken.lease)
                if state is LeaseState.CANCEL_REQUESTED:
                    hold_days(
                        connection, self.settings.target_schema, taken.assets, taken.days, cancelled=taken.run.run_id
                    )
                elif state is LeaseState.VALID and result is not None:
                    self._record_failure(connection, taken, taken.days, result, began_at)
        if state is not LeaseState.LOST:  # 谁删去租约谁数：没了的由收尾的数
            metrics.run_ended(
                trigger_of(taken.run), outcome_of(result, state), seconds=time.monotonic() - taken.lease.asked_at
            )
        # 提交了才改网页上的：死在两步之间，CANCELING 而没有租约的由对账的收尾；反过来，搁置就丢了
        if state is not LeaseState.CANCEL_REQUESTED:
            return
        run = self.instance.get_run_by_id(taken.run.run_id)
        if run is not None and run.status in (
            DagsterRunStatus.CANCELING,
            DagsterRunStatus.STARTED,
            DagsterRunStatus.STARTING,
        ):
            self.instance.report_run_canceled(run, if_cancelled)

    def _release(self, lease: Lease) -> LeaseState:
        with translated_errors(), autocommitting(self.engine) as connection:
            return leases.release_lease(connection, lease)

    def _record_failure(
        self, connection: sa.Connection, taken: TakenRun, days: DayRange, result: RunResult, began_at: datetime | None
    ) -> None:
        """失败的资产与排在它后面的没做成，别的分支照样做完了；失败的资产也要有完成事件。

        不知道是哪个失败的，就是没做完的那些；数据都提交了才出的错，没有哪个资产失败。排在两个失败的后面的，只算头一个的。
        """
        run, assets = taken.run, taken.assets
        target, told = self.settings.target_schema, set[str]()
        for failure in result.failures:
            own, reason = [asset for asset in self._undone(failure.asset, assets) if asset not in told], failure.error
            told.update(own)
            unfinished = record_failure(
                connection, target, own, days, reason=reason, kind=failure.kind, run_id=run.run_id, began_at=began_at
            )
            if not is_of_event(run):
                unfinished = unfinished_assets(connection, target, run.run_id, own, days)
            if unfinished:
                asset = failure.asset if failure.asset in assets else unfinished[0]
                record_failed_run(connection, target, days, asset=asset, run_id=run.run_id, error=reason)

    def _undone(self, failed: str | None, assets: tuple[str, ...]) -> tuple[str, ...]:
        """这个资产失败了，运行的哪些资产没做成。"""
        if failed is None or failed not in assets:
            return assets
        behind = self.location.graph.descendants(failed)
        return tuple(asset for asset in assets if asset == failed or asset in behind)


def trigger_of(run: DagsterRun) -> metrics.Trigger:
    return "event" if is_of_event(run) else "person"


def outcome_of(result: RunResult | None, state: LeaseState) -> metrics.RunOutcome:
    """:param result: None 表示还没结束就放手。"""
    if result is not None and result.succeeded:
        return "success"
    return "canceled" if state is LeaseState.CANCEL_REQUESTED else "failure"


def record_failed_run(
    connection: sa.Connection, target: str, days: DayRange, *, asset: str, run_id: str, error: str
) -> None:
    """失败的完成事件，写进发件箱；缘由记下来给 `etl status` 看。"""
    note_failed_run(connection, target, days, asset=asset, run_id=run_id, reason=error)
    completion = Completion(
        asset=asset,
        days=days,
        run_id=run_id,
        status="failed",
        downstream="pending",
        import_ids=waiting_imports(connection, target, asset, days),
        error=error,
    )
    add_completion(connection, target, completion)


def _warn_of_missing_indexes() -> None:
    """没有索引也做得成，只是慢：说一声。缺权限的这里不管，看不了就算了。"""
    with contextlib.suppress(DatabaseRefusedError), translated_errors(), get_engine().connect() as connection:
        if found := find_index_work(connection, get_settings()):
            tables = sorted({work.table_name for work in found})
            remedy = "`etl init-db` prints the statements, `etl init-db --create-indexes` runs them"
            logger.warning(
                "indexes are missing or INVALID, work grows with the tables",
                indexes=len(found),
                tables=tables,
                remedy=remedy,
            )


def _load_code(instance: DagsterInstance) -> CodeLocation:
    try:
        location = CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)
        location.warm_up(instance, JOB_NAME)
    except EtlError:
        raise
    except Exception as error:
        logger.exception("the code cannot be loaded")
        # Dagster 包着导入的错误，说的是它自己的命令行选项
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise CodeLocationError(CODE_MODULE, cause) from error
    return location
