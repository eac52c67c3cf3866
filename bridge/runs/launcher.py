"""运行启动者：停下一个运行，说出它的工人是否还活着。执行由工人来做，见 run_worker。

由 dagster.yaml 指名，活在网页与守护进程里；从不载入用户代码。
"""

from __future__ import annotations

from typing import Any

from dagster import DagsterRun

from bridge.runs.run_queue import QueuesRuns
from bridge.warm_dagster.internals import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine
from etl_assets.ledger.leases import read_lease, request_cancel


class WarmRunLauncher(QueuesRuns, RunLauncher[Any]):
    """运行在常驻的工人里执行，它们的租约在 ETL 的数据库里。"""

    def launch_run(self, context: LaunchRunContext) -> None:
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
        with translated_errors(), get_engine().begin() as connection:
            if request_cancel(connection, run_id):
                return True
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_canceled(run, "Cancelled while no worker was executing it.")
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        with translated_errors(), get_engine().connect() as connection:
            lease = read_lease(connection, run.run_id)
        if lease is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "no worker has this run")
        if lease.is_live:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=lease.owner)
        return CheckRunHealthResult(WorkerStatus.FAILED, f"worker {lease.owner} stopped answering", run_worker_id=lease.owner)

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str:  # noqa: ARG002  # 签名照 Dagster 的
        health = self.check_run_worker_health(run)
        return f"{health.status.value}: {health.msg or health.run_worker_id}"
