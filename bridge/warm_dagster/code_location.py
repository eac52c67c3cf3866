"""预先载入的代码位置：建运行、在线程里执行运行，不经 gRPC，也从不重新载入。

由 test_dagster_contract 看守：换 Dagster 版本而这里的假设不再成立时，那里先失败。
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dagster import (
    AssetCheckKey,
    AssetKey,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    JobDefinition,
    RepositoryDefinition,
)

from bridge.warm_dagster import internals
from bridge.warm_dagster.instance import deferring_events
from bridge.warm_dagster.runs import finished_assets
from bridge.warm_dagster.storage_faults import noting_faults
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import fault_of
from etl_assets.core.errors import FailureKind
from etl_assets.ledger.graph import AssetGraph
from etl_assets.orchestration.asset_runs import failure_kind_in, partition_tags
from etl_assets.orchestration.graph import graph_of


@dataclass(frozen=True)
class RunFailure:
    """哪个资产失败了（说不出是哪个的是 None），是哪一种失败，一句话。"""

    asset: str | None
    kind: FailureKind
    error: str


@dataclass(frozen=True)
class RunResult:
    """一个运行的结局。一个资产失败了，不靠它的照样做完，所以失败的可能不止一个。"""

    failures: tuple[RunFailure, ...] = ()

    @property
    def succeeded(self) -> bool:
        return not self.failures

    @property
    def error(self) -> str:
        return "; ".join(failure.error for failure in self.failures)


@dataclass(frozen=True)
class _PlannedJob:
    """某个资产选择下的作业与它的计划快照：内容不变，只算一次。"""

    job: JobDefinition
    assets: frozenset[AssetKey] | None
    checks: frozenset[AssetCheckKey] | None
    run_config: Mapping[str, object]
    step_keys: Sequence[str]
    plan_snapshot: internals.ExecutionPlanSnapshot


class CodeLocation:
    """一个代码位置，载入一次；运行带着它的名字，网页才能重新执行它们。"""

    def __init__(self, *, module: str, attribute: str, location_name: str) -> None:
        reconstructable = internals.ReconstructableRepository.for_module(module, attribute, None)
        self.repository: RepositoryDefinition = internals.initialize_repository_def_from_pointer(
            reconstructable.pointer
        )
        self.graph: AssetGraph = graph_of(self.repository.asset_graph.assets_defs)
        target = internals.LoadableTargetOrigin(executable_path=sys.executable, module_name=module, attribute=attribute)
        location_origin = internals.ManagedGrpcPythonEnvCodeLocationOrigin(target, location_name)
        self._python_origin = reconstructable.get_python_origin()
        self._remote_origin = internals.RemoteRepositoryOrigin(location_origin, self.repository.name)
        # Dagster 自己的缓存只记一个作业：轮着做几种选择，就一遍遍重新载入
        self._subsets: dict[tuple[str, frozenset[AssetKey] | None, frozenset[AssetCheckKey] | None], JobDefinition] = {}
        self._plans: dict[tuple[str, frozenset[AssetKey] | None, frozenset[AssetCheckKey] | None], _PlannedJob] = {}

    def job(
        self,
        name: str,
        asset_selection: frozenset[AssetKey] | None = None,
        check_selection: frozenset[AssetCheckKey] | None = None,
    ) -> JobDefinition:
        """作业，或它的一个资产子集；子集算一次就留着。没有点名检查（None）就是所选资产的全部检查。"""
        key = (name, asset_selection, check_selection)
        if key not in self._subsets:
            whole = self.repository.get_job(name)
            self._subsets[key] = whole.get_subset(
                asset_selection=asset_selection, asset_check_selection=check_selection
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

        建它的马上就执行它：计划的事件与执行的头几个一起写。

        :param retry_of: 它重做的那个失败的运行；网页上两个连在一起。
        """
        selection = frozenset(map(_key, assets))
        parent = instance.get_run_by_id(retry_of) if retry_of else None
        with deferring_events(instance, is_continued=True):
            planned = self._plan(instance, job_name, selection)
            return self._create(instance, planned, run_id=run_id, tags={**partition_tags(days), **tags}, parent=parent)

    def create_retry(
        self, instance: DagsterInstance, run: DagsterRun, *, run_id: str, tags: Mapping[str, str]
    ) -> DagsterRun | None:
        """重做一个死了的运行：只做没做完的资产，其余照旧；资产都做完了就不必重做（None）。"""
        selection = frozenset(run.asset_selection or ()) - finished_assets(instance, run.run_id)
        if run.asset_selection and not selection:
            return None
        # 父与根由 _create 重新写：抄来的指着更早的那一个
        rewritten = (internals.PARENT_RUN_ID_TAG, internals.ROOT_RUN_ID_TAG)
        kept = {name: value for name, value in run.tags.items() if name not in rewritten}
        checks = None if selection or not run.asset_check_selection else frozenset(run.asset_check_selection)
        with deferring_events(instance):
            planned = self._plan(instance, run.job_name, selection or None, checks, run.run_config)
            return self._create(instance, planned, run_id=run_id, tags={**kept, **tags}, parent=run)

    def _create(
        self,
        instance: DagsterInstance,
        planned: _PlannedJob,
        *,
        run_id: str,
        tags: Mapping[str, str],
        parent: DagsterRun | None,
    ) -> DagsterRun:
        job = planned.job
        lineage: dict[str, str] = {}
        if parent is not None:
            root_id = parent.root_run_id or parent.run_id
            lineage = {internals.PARENT_RUN_ID_TAG: parent.run_id, internals.ROOT_RUN_ID_TAG: root_id}
        return instance.create_run(
            job_name=job.name,
            run_id=run_id,
            run_config=planned.run_config,
            status=DagsterRunStatus.NOT_STARTED,
            tags={**job.run_tags, **tags, **lineage},
            root_run_id=lineage.get(internals.ROOT_RUN_ID_TAG),
            parent_run_id=lineage.get(internals.PARENT_RUN_ID_TAG),
            step_keys_to_execute=planned.step_keys,
            execution_plan_snapshot=planned.plan_snapshot,
            job_snapshot=job.get_job_snapshot(),
            parent_job_snapshot=job.get_parent_job_snapshot(),
            asset_selection=planned.assets,
            asset_check_selection=planned.checks,
            resolved_op_selection=None,
            op_selection=None,
            # 这两个 origin 缺一个，网页就不能重新执行它：submit_run 要看
            remote_job_origin=self._remote_origin.get_job_origin(job.name),
            job_code_origin=self._python_origin.get_job_origin(job.name),
            asset_graph=job.asset_layer.asset_graph,
        )

    def warm_up(self, instance: DagsterInstance, job_name: str) -> None:
        """先算好从每个资产起的计划：领到的工作几乎总是其中之一。"""
        for asset in self.graph.names:
            self._plan(instance, job_name, frozenset(map(_key, (asset, *self.graph.descendants(asset)))))

    def execute_run(self, instance: DagsterInstance, run: DagsterRun) -> RunResult:
        """在本线程里执行到底；资产的失败不抛出，记在结果里。"""
        checks = None if run.asset_check_selection is None else frozenset(run.asset_check_selection)
        job = self.job(run.job_name, frozenset(run.asset_selection or ()), checks)
        failures: list[RunFailure] = []
        succeeded, survived = False, 0
        with deferring_events(instance), noting_faults() as faults:
            # 不抛出：一个资产失败了，不靠它的还要做
            for event in internals.execute_run_iterator(_LoadedJob(job, self.repository), run, instance):
                if event.event_type == DagsterEventType.STEP_START:
                    survived = len(faults)  # 挺过去了的与这一步的失败无关
                if event.is_step_failure:
                    failures.append(self._failure(event, faults[survived:]))
                succeeded = succeeded or event.event_type == DagsterEventType.RUN_SUCCESS
        if not succeeded and not failures:
            failures = [RunFailure(None, "unknown", "the run ended without success; see its page in the UI")]
        return RunResult(tuple(failures))

    def _failure(self, event: DagsterEvent, faults: Sequence[Exception]) -> RunFailure:
        said, error = event.step_failure_data.user_failure_data, _innermost(event.step_failure_data.error)
        text = error.message.removeprefix(f"{error.cls_name}: ").strip() if error else ""
        return RunFailure(
            asset=next(
                (name for name in self.graph.names if _key(name).to_python_identifier() == event.step_key), None
            ),
            kind=(said and failure_kind_in(said.metadata)) or _kind_of_faults(faults),
            error=(said and said.description) or text,
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
            plan = internals.create_execution_plan(job, run_config=run_config or {}, instance_ref=instance.get_ref())
            snapshot = internals.snapshot_from_execution_plan(plan, job.get_job_snapshot_id())
            planned = _PlannedJob(job, selection, checks, run_config or {}, plan.step_keys_to_execute, snapshot)
            # 带配置的不留：key 里没有配置，留下了，不带配置的也会拿到它
            if run_config:
                return planned
            self._plans[key] = planned
        return self._plans[key]


class _LoadedJob(internals.InMemoryJob):
    """已在内存里的作业，要做的资产已经选好；与 ReconstructableJob 不同，它从不重新载入代码。"""

    def __init__(self, job: JobDefinition, repository: RepositoryDefinition) -> None:
        super().__init__(job)
        self._repository = repository

    def get_repository_definition(self) -> RepositoryDefinition:
        return self._repository

    def get_subset(self, *, op_selection: Iterable[str] | None = None, **_chosen: object) -> internals.InMemoryJob:
        if op_selection is None:
            return self
        return _LoadedJob(self.get_definition().get_subset(op_selection=set(op_selection)), self._repository)


def _key(asset: str) -> AssetKey:
    return AssetKey.from_user_string(asset)


def _kind_of_faults(faults: Sequence[Exception]) -> FailureKind:
    """步骤自己没有说是谁的错：存储在这一步里出过错的，就是它的；代码的错说不准。"""
    fault = fault_of(faults[-1]) if faults else None
    return "unknown" if fault is None else fault.kind


def _innermost(error: internals.SerializableErrorInfo | None) -> internals.SerializableErrorInfo | None:
    """Dagster 把异常包了几层，它的存储的也是：取最里面说得出原因的那一层。"""
    while error is not None and error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    return error
