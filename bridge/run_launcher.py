"""运行启动者：停下一个运行，说出它的工人是否还活着。执行由工人来做，见 run_worker。

由 dagster.yaml 指名，活在网页与守护进程里；从不载入用户代码。
"""

from __future__ import annotations

from typing import Any, Self

from bridge.dagster_adapter import (
    CheckRunHealthResult,
    ConfigurableClass,
    ConfigurableClassData,
    DagsterRun,
    LaunchRunContext,
    RunLauncher,
    WorkerStatus,
)
from bridge.doorbell import Doorbell
from bridge.run_lanes import LANE_TAG, lane_of
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine
from etl_assets.services.leases import read_lease, request_cancel


class WarmRunLauncher(RunLauncher[Any], ConfigurableClass):
    """运行在常驻的工人里执行，它们的租约在 ETL 的数据库里。"""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._doorbell = Doorbell()
        super().__init__()  # type: ignore[no-untyped-call]  # Dagster 没有标注它

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        """不经协调者直接启动的运行：也进队列。"""
        run = context.dagster_run
        lane = lane_of(run)
        self._instance.add_run_tags(run.run_id, {LANE_TAG: lane})
        self._doorbell.ring(run.run_id, lane)

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
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "no worker holds this run")
        if lease.is_live:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=lease.owner)
        return CheckRunHealthResult(WorkerStatus.FAILED, f"worker {lease.owner} stopped answering", run_worker_id=lease.owner)

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str:  # noqa: ARG002
        health = self.check_run_worker_health(run)
        return f"{health.status.value}: {health.msg or health.run_worker_id}"
