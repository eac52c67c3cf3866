"""运行协调者：网页、定时、感应器、回填提交的运行都进同一个任务队列，留在 QUEUED，直到一个工人接手。

由 dagster.yaml 指名，活在网页与守护进程里；从不载入用户代码。
"""

from __future__ import annotations

from typing import Any, Self

from bridge.dagster_adapter import ConfigurableClass, ConfigurableClassData, DagsterRun, RunCoordinator, SubmitRunContext, enqueue
from bridge.doorbell import Doorbell
from bridge.run_lanes import LANE_TAG, lane_of
from bridge.run_launcher import WarmRunLauncher


class TaskQueueRunCoordinator(RunCoordinator[Any], ConfigurableClass):
    """没有第二个队列，也没有轮询。"""

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

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = context.dagster_run
        lane = lane_of(run)
        self._instance.add_run_tags(run.run_id, {LANE_TAG: lane})
        enqueue(self._instance, run)
        self._doorbell.ring(run.run_id, lane)
        return self._instance.get_run_by_id(run.run_id) or run

    def cancel_run(self, run_id: str) -> bool:
        launcher: WarmRunLauncher = self._instance.run_launcher
        return launcher.terminate(run_id)
