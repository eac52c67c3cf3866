"""一个工人进程里常驻的东西：载入一次的代码位置、Dagster 实例、引擎；把到期的日子与网页来的运行执行到底。"""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import dataclass, field
from functools import cached_property
from uuid import uuid4

import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from bridge.code_location import CODE_MODULE, JOB_NAME, LOCATION_NAME
from bridge.dagster_adapter import CodeLocation, RunResult, flush_events, open_instance, report_starting, scope_of
from bridge.errors import CodeLocationError, is_transient
from bridge.run_lanes import LANE_TAG
from bridge.settings import BridgeSettings
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine, get_engine
from etl_assets.core.errors import EtlError, PermanentError, TransientError
from etl_assets.core.interruption import Interruption, current_interruption
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.services import leases, ledger
from etl_assets.services.leases import Claim, Lease, LeaseState, claim_due_days, current_lease
from etl_assets.services.outbox import Completion, add_completion

logger = get_logger(__name__)

_TAGGED_EVENTS = 10
_OF_DRIVERS = {"OperationalError", "InterfaceError"}
"""Dagster 自己的存储断了线：没有人翻译过的错误。"""
TRIGGER_TAG = "etl/trigger"
EVENT = "event"


@dataclass(frozen=True)
class HeldRun:
    """手里的一个运行：assets 是链上的资产，上游在前；days 是它的日子，没有分区的运行是 None。"""

    run: DagsterRun
    lease: Lease
    assets: tuple[str, ...]
    days: DayRange | None
    interruption: Interruption = field(default_factory=Interruption)


@dataclass(frozen=True)
class RunWorker:
    """阻塞的部分；任务用 asyncio.to_thread 调它们。"""

    instance: DagsterInstance
    location: CodeLocation
    engine: sa.Engine
    settings: EtlSettings
    lease_seconds: float
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")

    @classmethod
    def load(cls, bridge_settings: BridgeSettings) -> RunWorker:
        """载入代码位置，连上 Dagster 的存储，把作业先算一遍：第一个事件就走热的路。

        :raises CodeLocationError: 代码有错。
        """
        instance = open_instance()
        worker = cls(
            instance=instance,
            location=_load_code(instance),
            engine=get_engine(),
            settings=get_settings(),
            lease_seconds=bridge_settings.lease_seconds,
        )
        # 载入的代码有上百万个对象，一次完整的垃圾回收就是 0.1 秒：它们不会死，以后不再看
        gc.collect()
        gc.freeze()
        return worker

    @cached_property
    def heartbeats(self) -> sa.Engine:
        """心跳自己的一个连接：运行用光了连接池、池里的连接哑了，都不碍它；没有回音的，租约到期之前来得及在新的连接上再试。"""
        seconds = self.lease_seconds / 3
        own = self.settings.model_copy(update={"pool_size": 1, "connect_timeout_seconds": max(2, int(seconds))})
        return build_engine(own, longest_wait_seconds=seconds)

    # ---- 拿到手 -----------------------------------------------------------------

    def claim(self) -> Claim | None:
        """领一段到期的日子。"""
        with translated_errors(), self.engine.begin() as connection:
            return claim_due_days(
                connection, self.settings.target_schema, run_id=str(uuid4()), owner=self.owner, lease_seconds=self.lease_seconds
            )

    def has_days_in_a_rush(self) -> bool:
        """有没有日子要等一阵急雨过去才能领。"""
        with translated_errors(), self.engine.connect() as connection:
            return leases.has_days_in_a_rush(connection, self.settings.target_schema)

    def start(self, claim: Claim) -> HeldRun:
        """给领到的日子建一个运行；标签说是哪些事件要的。"""
        with translated_errors(), self.engine.connect() as connection:
            events = ledger.waiting_events(connection, self.settings.target_schema, claim.assets[0], claim.days, limit=_TAGGED_EVENTS)
        asked_by = {
            "etl/import_id": ",".join(str(event.import_id) for event in events),
            "etl/event_id": ",".join(str(event.event_id) for event in events),
            "etl/stream_sequence": ",".join(str(event.stream_sequence) for event in events if event.stream_sequence),
        }
        run = self.location.create_run(
            self.instance,
            job_name=JOB_NAME,
            run_id=claim.lease.run_id,
            assets=claim.assets,
            days=claim.days,
            tags={TRIGGER_TAG: EVENT, LANE_TAG: "event", **{name: value for name, value in asked_by.items() if value}},
            retry_of=claim.retry_of,
        )
        return HeldRun(run=run, lease=claim.lease, assets=claim.assets, days=claim.days)

    def take(self, run_id: str) -> HeldRun | None:
        """接手队列里的一个运行；结束了的、取消了的、别人正在做的是 None。

        先拿租约再看状态，取消的一方先标状态再看租约：两边总有一边看见另一边。
        """
        run = self.instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return None
        scope = scope_of(run)
        with translated_errors(), self.engine.begin() as connection:
            lease = leases.acquire_lease(
                connection, self.settings.target_schema, scope.days, run_id=run_id, owner=self.owner, lease_seconds=self.lease_seconds
            )
        if lease is None:
            return None
        run = self.instance.get_run_by_id(run_id)
        if run is None or run.status not in (DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING):
            if run is not None and run.status is DagsterRunStatus.CANCELING:
                self.instance.report_run_canceled(run, "Cancelled before a worker began to execute it.")
            self._release(lease)
            return None
        return HeldRun(run=report_starting(self.instance, run), lease=lease, assets=scope.assets, days=scope.days)

    # ---- 执行 -------------------------------------------------------------------

    def execute(self, held: HeldRun) -> RunResult:
        """在本线程里执行、释放租约；到期的日子失败了记进台账，由台账决定何时再试。"""
        tokens = current_lease.set(held.lease), current_interruption.set(held.interruption)
        try:
            result = self.location.execute_run(self.instance, held.run)
        except Exception as error:  # noqa: BLE001  # 代码位置里没有的作业、坏了的快照：运行失败，工人还在
            result = self._fail(held.run, error)
        finally:
            current_lease.reset(tokens[0])
            current_interruption.reset(tokens[1])
        self._finish(held, result)
        return result

    def heartbeat(self, held: HeldRun) -> LeaseState:
        """续租；看有没有人要取消；到此为止的日志写给网页看。"""
        with translated_errors(), self.heartbeats.begin() as connection:
            state = leases.extend_lease(connection, held.lease, lease_seconds=self.lease_seconds)
        with translated_errors():
            flush_events(self.instance)
        return state

    def note_cancel(self, held: HeldRun) -> None:
        """取消的请求可能正赶上我们标 STARTED，被盖掉了：补上，Dagster 才以 CANCELED 收场。"""
        run = self.instance.get_run_by_id(held.run.run_id)
        if run is not None and not run.is_finished and run.status is not DagsterRunStatus.CANCELING:
            self.instance.report_run_canceling(run)

    def abandon(self, held: HeldRun, *, grace_seconds: float) -> None:
        """取消了却停不下来的运行：收回租约，它再也提交不了；进程随后换掉。"""
        message = f"Cancelled; it did not stop within {grace_seconds:g} s (ETL_CANCEL_GRACE_SECONDS), so its worker process is replaced."
        if self._let_go(held, None) is LeaseState.CANCEL_REQUESTED:
            self._report_canceled(held, message)

    def _fail(self, run: DagsterRun, error: Exception) -> RunResult:
        logger.exception("run failed outside its steps", run_id=run.run_id)
        remedy = (
            "A server was away; days that are still due are made again by themselves."
            if is_transient(error)
            else "If the code was changed, restart the workers and the code location so that they have the same, and launch it again."
        )
        message = f"The worker could not execute this run: {type(error).__name__}: {error}. {remedy}"
        current = self.instance.get_run_by_id(run.run_id)
        if current is not None and not current.is_finished:
            self.instance.report_run_failed(current, message)
        return RunResult(succeeded=False, error_class=type(error).__name__, error=message)

    def _finish(self, held: HeldRun, result: RunResult) -> None:
        """取消来得太晚时，CANCELING 会盖掉 SUCCESS，没有别人来收尾。"""
        if self._let_go(held, result) is LeaseState.CANCEL_REQUESTED:
            self._report_canceled(held, "The cancellation arrived after the work was done.")

    def _let_go(self, held: HeldRun, result: RunResult | None) -> LeaseState:
        """释放租约，同一事务里记下没做成的日子；租约早已不是我们的，就什么也不记，新的持有者会做。

        :param result: None 表示还没结束就放手。
        """
        with translated_errors(), self.engine.begin() as connection:
            state = leases.release_lease(connection, held.lease)
            if held.days is None or not held.assets or (result is not None and result.succeeded):
                return state
            if state is LeaseState.CANCEL_REQUESTED:
                reason = f"run {held.run.run_id} was cancelled"
                ledger.hold_days(connection, self.settings.target_schema, held.assets, held.days, reason=reason)
            elif state is LeaseState.HELD and result is not None:
                self._record_failure(connection, held.assets, held.days, held.run.run_id, result)
        return state

    def _report_canceled(self, held: HeldRun, message: str) -> None:
        run = self.instance.get_run_by_id(held.run.run_id)
        if run is not None and run.status in (DagsterRunStatus.CANCELING, DagsterRunStatus.STARTED, DagsterRunStatus.STARTING):
            self.instance.report_run_canceled(run, message)

    def _release(self, lease: Lease) -> None:
        with translated_errors(), self.engine.begin() as connection:
            leases.release_lease(connection, lease)

    def _record_failure(self, connection: sa.Connection, assets: tuple[str, ...], days: DayRange, run_id: str, result: RunResult) -> None:
        """失败的资产也要有完成事件。"""
        asset = result.failed_step if result.failed_step in assets else assets[0]
        target = self.settings.target_schema
        record_failed_run(connection, target, days, asset=asset, run_id=run_id, error=result.error)
        ledger.record_failure(connection, target, assets, days, reason=result.error, kind=_kind_of(result), run_id=run_id)


def record_failed_run(connection: sa.Connection, target: str, days: DayRange, *, asset: str, run_id: str, error: str) -> None:
    """失败的完成事件，写进发件箱。"""
    completion = Completion(
        asset=asset,
        days=days,
        run_id=run_id,
        status="failed",
        downstream="pending",
        import_ids=ledger.waiting_imports(connection, target, asset, days),
        error=error,
    )
    add_completion(connection, target, completion)


def _kind_of(result: RunResult) -> ledger.Failure:
    if result.error_class in _class_names(PermanentError):
        return "permanent"
    return "transient" if result.error_class in _class_names(TransientError) | _OF_DRIVERS else "unknown"


def _load_code(instance: DagsterInstance) -> CodeLocation:
    try:
        location = CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)
        location.warm_up(instance, JOB_NAME, ledger.ASSETS)
    except EtlError:
        raise
    except Exception as error:
        logger.exception("the code cannot be loaded")
        # Dagster 包着导入的错误，说的是它自己的命令行选项
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        raise CodeLocationError(CODE_MODULE, cause) from error
    return location


def _class_names(base: type[EtlError]) -> set[str]:
    """Dagster 只留下异常的类名：由类名认出类别。"""
    return {base.__name__}.union(*(_class_names(kind) for kind in base.__subclasses__()))
