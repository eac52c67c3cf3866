"""由 dagster.yaml 指名的协调器与启动器：运行都进同一个任务队列，标上车道，敲响工人的门；执行由工人来做，见 RunWorker。

活在网页与守护进程里；从不载入用户代码。
"""

from __future__ import annotations

from typing import Any, Self

from dagster import DagsterInstance, DagsterRun

from bridge.queue.doorbell import Doorbell
from bridge.runs.lanes import lane_of, submission_tags
from bridge.warm_dagster import internals
from bridge.warm_dagster.runs import enqueue
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.ledger.leases import read_lease, request_cancel


class _QueuesRuns(internals.ConfigurableClass):
    """二者共有的：没有配置项，有门铃。"""

    def __init__(self, inst_data: internals.ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._doorbell = Doorbell()
        super().__init__()

    @property
    def inst_data(self) -> internals.ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: internals.ConfigurableClassData | None, config_value: Any) -> Self:
        return cls(inst_data=inst_data, **config_value)

    def tag(self, instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
        """写下车道：经队列执行的运行都带着它。返回写了标签的运行。"""
        tags = submission_tags(instance, run)
        instance.add_run_tags(run.run_id, tags)
        return run.with_tags({**run.tags, **tags})

    def ring(self, run: DagsterRun) -> None:
        """让一个工人执行这个运行。"""
        self._doorbell.ring(run.run_id, lane_of(run))


class TaskQueueRunCoordinator(_QueuesRuns, internals.RunCoordinator[Any]):
    """网页、定时、传感器、回填提交的运行留在 QUEUED，直到一个工人接手：没有第二个队列，也没有轮询。"""

    def submit_run(self, context: internals.SubmitRunContext) -> DagsterRun:
        # 先有车道再排队：没有标签的 QUEUED，对账的工人不认；那时门铃又丢了，它就永远等着
        run = self.tag(self._instance, context.dagster_run)
        enqueue(self._instance, run)
        # 最后才敲：工人可能马上接手、标上 STARTING，那时再标 QUEUED 就盖掉了；守护进程的存储不拦倒退
        self.ring(run)
        return self._instance.get_run_by_id(run.run_id) or run

    def cancel_run(self, run_id: str) -> bool:
        launcher: WarmRunLauncher = self._instance.run_launcher
        return launcher.terminate(run_id)


class WarmRunLauncher(_QueuesRuns, internals.RunLauncher[Any]):
    """停下一个运行，说出它的工人是否还活着；运行的租约在 ETL 的数据库里。"""

    def launch_run(self, context: internals.LaunchRunContext) -> None:
        """不经协调器直接启动的运行：也进队列。"""
        self.ring(self.tag(self._instance, context.dagster_run))

    def terminate(self, run_id: str) -> bool:
        """取消：没人做的当场取消，正在做的由它的工人停下。

        先标 CANCELING 再看租约，工人先拿租约再看状态：两边总有一边看见另一边。
        """
        instance = self._instance
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        instance.report_run_canceling(run)
        if transact(get_engine(), request_cancel, run_id):
            return True
        run = instance.get_run_by_id(run_id)
        # 标着的工夫里它也许刚好做完、放下了租约：结束了的不改
        if run is not None and not run.is_finished:
            instance.report_run_canceled(run, "Cancelled while no worker was executing it.")
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> internals.CheckRunHealthResult:
        # 问不到就抛错，不答 UNKNOWN：Dagster 把 RUNNING、SUCCESS 以外的回答都当成死了
        lease = transact(get_engine(), read_lease, run.run_id)
        if lease is None:
            return internals.CheckRunHealthResult(internals.WorkerStatus.NOT_FOUND, "no worker has this run")
        if lease.is_live:
            return internals.CheckRunHealthResult(internals.WorkerStatus.RUNNING, run_worker_id=lease.owner)
        return internals.CheckRunHealthResult(
            internals.WorkerStatus.FAILED, f"worker {lease.owner} stopped answering", run_worker_id=lease.owner
        )

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str:  # noqa: ARG002  # 签名照 Dagster 的
        health = self.check_run_worker_health(run)
        return f"{health.status.value}: {health.msg or health.run_worker_id}"
