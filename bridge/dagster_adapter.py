"""Dagster 的内部：预先载入的代码位置、建运行、在线程里执行运行。

由 test_dagster_contract 看守：换 Dagster 版本而这里的假设不再成立时，那里先失败。
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from dagster import (
    AssetCheckKey,
    AssetKey,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    EventLogEntry,
    JobDefinition,
    RepositoryDefinition,
    RunRecord,
    RunsFilter,
)
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage

from bridge.dagster_internals import (
    BACKFILL_ID_TAG,
    PARENT_RUN_ID_TAG,
    ROOT_RUN_ID_TAG,
    SCHEDULE_NAME_TAG,
    SENSOR_NAME_TAG,
    ExecutionPlanSnapshot,
    IJob,
    LoadableTargetOrigin,
    ManagedGrpcPythonEnvCodeLocationOrigin,
    ReconstructableRepository,
    RemoteRepositoryOrigin,
    SerializableErrorInfo,
    context_creation_job,
    create_execution_plan,
    create_pg_engine,
    execute_run_iterator,
    initialize_repository_def_from_pointer,
    snapshot_from_execution_plan,
)
from bridge.lean_storage import LeanEventLogStorage, LeanRunStorage
from etl_assets.asset_runs import partition_tags, tagged_days
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import ping_idle_connections, replace_read_only_sessions
from etl_assets.core.errors import SettingsError
from etl_assets.core.silent_connections import SilenceWatch, libpq_patience
from etl_assets.services.ledger import ASSETS

_POOL_SIZE = 2
_LONGEST_WAIT_SECONDS = 600.0
"""Dagster 的存储没有一条语句要做这么久。"""
_CONSOLE_LOGGERS = "default_system_loggers"


@dataclass(frozen=True)
class RunResult:
    """一个运行的结局；失败时给出最里层错误的类名与消息，以及失败的资产。"""

    succeeded: bool
    failed_step: str | None = None
    error_class: str = ""
    error: str = ""


@dataclass(frozen=True)
class _PlannedJob:
    """某个资产选择下的作业与它的计划快照：内容不变，只算一次。"""

    job: JobDefinition
    checks: frozenset[AssetCheckKey] | None
    step_keys: Sequence[str]
    plan_snapshot: ExecutionPlanSnapshot


class CodeLocation:
    """一个代码位置，载入一次；运行带着它的名字，网页才能重新执行它们。"""

    def __init__(self, *, module: str, attribute: str, location_name: str) -> None:
        reconstructable = ReconstructableRepository.for_module(module, attribute, None)
        self.repository: RepositoryDefinition = initialize_repository_def_from_pointer(reconstructable.pointer)
        target = LoadableTargetOrigin(executable_path=sys.executable, module_name=module, attribute=attribute)
        location_origin = ManagedGrpcPythonEnvCodeLocationOrigin(target, location_name)
        self._python_origin = reconstructable.get_python_origin()
        self._remote_origin = RemoteRepositoryOrigin(location_origin, self.repository.name)
        self._subsets: dict[tuple[str, frozenset[AssetKey] | None, frozenset[AssetCheckKey] | None], JobDefinition] = {}
        self._plans: dict[tuple[str, frozenset[AssetKey] | None, frozenset[AssetCheckKey] | None], _PlannedJob] = {}

    def job(
        self, name: str, asset_selection: frozenset[AssetKey] | None = None, check_selection: frozenset[AssetCheckKey] | None = None
    ) -> JobDefinition:
        """作业，或它的一个资产子集；子集算一次就留着。没有点名检查（None）就是所选资产的全部检查。"""
        key = (name, asset_selection, check_selection)
        if key not in self._subsets:
            whole = self.repository.get_job(name)
            is_subset = asset_selection or check_selection
            self._subsets[key] = (
                whole.get_subset(asset_selection=asset_selection, asset_check_selection=check_selection) if is_subset else whole
            )
        return self._subsets[key]

    def create_run(
        self,
        instance: DagsterInstance,
        *,
        job_name: str,
        run_id: str,
        assets: Iterable[str],
        days: DayRange,
        tags: Mapping[str, str],
        retry_of: str | None = None,
    ) -> DagsterRun:
        """建一个 NOT_STARTED 的运行：像网页那样建，只是不经 gRPC，快照也不重算。

        :param retry_of: 它重做的那个失败的运行；网页上两个连在一起。
        """
        selection = frozenset(AssetKey(asset) for asset in assets)
        parent = instance.get_run_by_id(retry_of) if retry_of else None
        return self._create(instance, job_name, selection, run_id=run_id, tags={**partition_tags(days), **tags}, parent=parent)

    def create_retry(self, instance: DagsterInstance, run: DagsterRun, *, run_id: str, tags: Mapping[str, str]) -> DagsterRun | None:
        """重做一个死了的运行：只做没做完的资产，其余照旧；资产都做完了就不必重做（None）。"""
        selection = frozenset(run.asset_selection or ()) - _finished_assets(instance, run.run_id)
        if run.asset_selection and not selection:
            return None
        kept = {name: value for name, value in run.tags.items() if name not in (PARENT_RUN_ID_TAG, ROOT_RUN_ID_TAG)}
        checks = None if selection else run.asset_check_selection
        return self._create(
            instance,
            run.job_name,
            selection or None,
            checks=frozenset(checks) if checks else None,
            run_id=run_id,
            tags={**kept, **tags},
            parent=run,
            run_config=run.run_config,
        )

    def _create(
        self,
        instance: DagsterInstance,
        job_name: str,
        selection: frozenset[AssetKey] | None,
        *,
        tags: Mapping[str, str],
        parent: DagsterRun | None,
        checks: frozenset[AssetCheckKey] | None = None,
        run_id: str | None = None,
        run_config: Mapping[str, object] | None = None,
    ) -> DagsterRun:
        planned = self._plan(instance, job_name, selection, checks, run_config)
        job = planned.job
        parent_id = parent.run_id if parent else None
        root_id = (parent.root_run_id or parent.run_id) if parent else None
        lineage = {PARENT_RUN_ID_TAG: parent_id, ROOT_RUN_ID_TAG: root_id} if parent_id and root_id else {}
        with deferring_events(instance):
            return instance.create_run(
                job_name=job_name,
                run_id=run_id,
                run_config=run_config or {},
                status=DagsterRunStatus.NOT_STARTED,
                tags={**job.run_tags, **tags, **lineage},
                root_run_id=root_id,
                parent_run_id=parent_id,
                step_keys_to_execute=planned.step_keys,
                execution_plan_snapshot=planned.plan_snapshot,
                job_snapshot=job.get_job_snapshot(),
                parent_job_snapshot=job.get_parent_job_snapshot(),
                asset_selection=selection,
                asset_check_selection=planned.checks,
                resolved_op_selection=None,
                op_selection=None,
                remote_job_origin=self._remote_origin.get_job_origin(job_name),
                job_code_origin=self._python_origin.get_job_origin(job_name),
                asset_graph=job.asset_layer.asset_graph,
            )

    def warm_up(self, instance: DagsterInstance, job_name: str, assets: Sequence[str]) -> None:
        """先算好从链上每个资产起的计划：领到的工作总是其中之一。"""
        for start in range(len(assets)):
            self._plan(instance, job_name, frozenset(AssetKey(asset) for asset in assets[start:]))

    def execute_run(self, instance: DagsterInstance, run: DagsterRun) -> RunResult:
        """在本线程里执行到底；资产的失败不抛出，记在结果里。"""
        failure: DagsterEvent | None = None
        succeeded = False
        with deferring_events(instance):
            for event in execute_run_iterator(_LoadedJob(self, self.job(run.job_name)), run, instance):
                if event.is_step_failure and failure is None:
                    failure = event
                succeeded = succeeded or event.event_type == DagsterEventType.RUN_SUCCESS
        if failure is None:
            return RunResult(succeeded=succeeded, error="" if succeeded else "the run ended without success; see its page in the UI")
        error = _innermost(failure.step_failure_data.error)
        return RunResult(
            succeeded=False,
            failed_step=failure.step_key,
            error_class=(error.cls_name if error else None) or "",
            error=error.message.removeprefix(f"{error.cls_name}: ").strip() if error else "",
        )

    def _plan(
        self,
        instance: DagsterInstance,
        job_name: str,
        selection: frozenset[AssetKey] | None,
        checks: frozenset[AssetCheckKey] | None = None,
        run_config: Mapping[str, object] | None = None,
    ) -> _PlannedJob:
        """没有点名检查时，做所选资产的、作业自己有的那些：None 会是代码位置里的全部。"""
        if selection and checks is None:
            own = self.job(job_name).asset_layer.asset_graph.asset_check_keys
            checks = frozenset(key for key in own if key.asset_key in selection)
        key = (job_name, selection, checks)
        if run_config or key not in self._plans:
            job = self.job(job_name, selection, checks)
            plan = create_execution_plan(job, run_config=run_config or {}, instance_ref=instance.get_ref())
            snapshot = snapshot_from_execution_plan(plan, job.get_job_snapshot_id())
            planned = _PlannedJob(job=job, checks=checks, step_keys=plan.step_keys_to_execute, plan_snapshot=snapshot)
            if run_config:
                return planned
            self._plans[key] = planned
        return self._plans[key]


class _LoadedJob(IJob):
    """已在内存里的作业；与 ReconstructableJob 不同，它从不重新载入代码。"""

    def __init__(self, location: CodeLocation, job: JobDefinition) -> None:
        self._location = location
        self._job = job

    def get_definition(self) -> JobDefinition:
        return self._job

    def get_repository_definition(self) -> RepositoryDefinition:
        return self._location.repository

    def get_subset(
        self,
        *,
        op_selection: Iterable[str] | None = None,
        asset_selection: AbstractSet[AssetKey] | None = None,
        asset_check_selection: AbstractSet[AssetCheckKey] | None = None,
    ) -> IJob:
        if op_selection is None:
            assets = None if asset_selection is None else frozenset(asset_selection)
            checks = None if asset_check_selection is None else frozenset(asset_check_selection)
            return _LoadedJob(self._location, self._location.job(self._job.name, assets, checks))
        subset = self._job.get_subset(
            op_selection=op_selection, asset_selection=asset_selection, asset_check_selection=asset_check_selection
        )
        return _LoadedJob(self._location, subset)

    @property
    def op_selection(self) -> AbstractSet[str] | None:
        return self._job.op_selection

    @property
    def asset_selection(self) -> AbstractSet[AssetKey] | None:
        return self._job.asset_selection

    @property
    def asset_check_selection(self) -> AbstractSet[AssetCheckKey] | None:
        return self._job.asset_check_selection


# ---- 运行的状态与范围 -----------------------------------------------------------------


@dataclass(frozen=True)
class RunScope:
    """一个运行要做的：链上的资产，上游在前；它的分区区间（没有分区、或分区不是日子的是 None）。"""

    assets: tuple[str, ...]
    days: DayRange | None


def scope_of(run: DagsterRun) -> RunScope:
    """由选择与标签得出；读不懂的分区留给执行它时报错。"""
    selected = {key.to_user_string() for key in run.asset_selection or ()}
    return RunScope(assets=tuple(asset for asset in ASSETS if asset in selected), days=tagged_days(run.tags))


def origin_of(run: DagsterRun) -> Literal["backfill", "automation", "person"]:
    """谁要的这个运行。"""
    if BACKFILL_ID_TAG in run.tags:
        return "backfill"
    return "automation" if run.tags.keys() & {SCHEDULE_NAME_TAG, SENSOR_NAME_TAG} else "person"


def enqueue(instance: DagsterInstance, run: DagsterRun) -> None:
    """标成 QUEUED：在队列里，随时可以取消。"""
    instance.report_dagster_event(DagsterEvent.job_enqueue(run), run_id=run.run_id)


def report_starting(instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
    """由执行者来标 STARTING：等在队列里的运行不该看上去像正在启动。"""
    starting = DagsterEvent(event_type_value=DagsterEventType.PIPELINE_STARTING.value, job_name=run.job_name)
    instance.report_dagster_event(starting, run_id=run.run_id)
    return run.with_status(DagsterRunStatus.STARTING)


def unfinished_runs(instance: DagsterInstance, *, tag: str) -> list[RunRecord]:
    """有这个标签、已提交而没有结束的运行，先建的在前。"""
    statuses = [DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
    records = instance.get_run_records(RunsFilter(statuses=statuses))
    return [record for record in reversed(records) if tag in record.dagster_run.tags]


def has_begun(instance: DagsterInstance, run_id: str) -> bool:
    """开始做过这个运行没有。"""
    record = instance.get_run_record_by_id(run_id)
    return record is not None and record.start_time is not None


def _finished_assets(instance: DagsterInstance, run_id: str) -> frozenset[AssetKey]:
    """这个运行里整步做完的资产。"""
    entries = instance.all_logs(run_id, of_type={DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.STEP_SUCCESS})
    events = [entry.dagster_event for entry in entries if entry.dagster_event]
    finished = {event.step_key for event in events if event.event_type == DagsterEventType.STEP_SUCCESS}
    return frozenset(event.asset_key for event in events if event.asset_key and event.step_key in finished)


def open_instance() -> DagsterInstance:
    """DAGSTER_HOME 指的实例，改成适合常驻进程的样子：存储共用一个连接池，运行不再各自往终端打日志。"""
    if not os.environ.get("DAGSTER_HOME"):
        raise SettingsError("DAGSTER_HOME is not set: take it from `etl env`, or point it at the folder of your dagster.yaml")
    instance = DagsterInstance.get()
    _share_pool(instance)
    _silence_console()
    _configure_logging_once(instance)
    instance._subscribers = _NoSubscribers()
    return instance


def deferring_events(instance: DagsterInstance) -> AbstractContextManager[None]:
    """期间的事件攒着写；别的存储（测试里的 SQLite）照旧。"""
    storage = instance.event_log_storage
    return storage.deferring() if isinstance(storage, LeanEventLogStorage) else nullcontext()


def flush_events(instance: DagsterInstance) -> None:
    """攒着的事件现在就写：做得久的一步，网页上也看得见它已经开始。"""
    storage = instance.event_log_storage
    if isinstance(storage, LeanEventLogStorage):
        storage.flush()


class _NoSubscribers(dict[str, list[Callable[[EventLogEntry], object]]]):
    """Dagster 给每个写过事件的运行留一个空的名单，从不删去；工人里没有人订阅。"""

    def __missing__(self, _run_id: str) -> list[Callable[[EventLogEntry], object]]:
        return []


def _share_pool(instance: DagsterInstance) -> None:
    """dagster-postgres 每条语句新建一个连接；三个存储换成共用一个连接池。"""
    runs, events, schedules = instance.run_storage, instance.event_log_storage, instance.schedule_storage
    if not (
        isinstance(runs, PostgresRunStorage)
        and isinstance(events, PostgresEventLogStorage)
        and isinstance(schedules, PostgresScheduleStorage)
    ):
        return
    pool = create_pg_engine(
        runs.postgres_url,
        None,
        isolation_level="AUTOCOMMIT",
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_SIZE,
        pool_use_lifo=True,
        connect_args=libpq_patience(sa.make_url(runs.postgres_url)),
    )
    SilenceWatch(pool, limit_seconds=_LONGEST_WAIT_SECONDS)
    ping_idle_connections(pool)
    replace_read_only_sessions(pool)
    for storage in (runs, events, schedules):
        storage._engine.dispose()
        storage._engine = pool
    # 同样的表、同样的状态，只是换上省些语句的写法
    runs.__class__ = LeanRunStorage
    LeanEventLogStorage.take_over(events)


def _configure_logging_once(instance: DagsterInstance) -> None:
    """Dagster 每个运行都重设一遍标准库的日志：拿着日志的锁去等别的运行的处理器，同一进程里两个运行会死锁。"""
    handlers = instance.get_yaml_python_handlers()
    instance.get_yaml_python_handlers = lambda: handlers  # type: ignore[method-assign]  # 实例上的，盖住类里的


def _silence_console() -> None:
    """运行的日志在 Dagster 里；进程自己的日志只有一种格式，不夹进每个事件一行的彩色文字。"""
    setattr(context_creation_job, _CONSOLE_LOGGERS, lambda _instance: [])


def _innermost(error: SerializableErrorInfo | None) -> SerializableErrorInfo | None:
    """Dagster 把异常包了几层（它的存储的也是），Failure 又是我们给运行页的那句话：取最里面说得出原因的那一层。"""
    while error is not None and error.cause is not None and (error.cls_name or "").startswith(("Dagster", "Failure")):
        error = error.cause
    return error
