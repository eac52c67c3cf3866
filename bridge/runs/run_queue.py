"""协调器与启动器共有的：由 dagster.yaml 指名、没有配置项，把运行标上车道、敲响工人的门。"""

from __future__ import annotations

from typing import Any, Self

from dagster import DagsterInstance, DagsterRun

from bridge.queue.doorbell import Doorbell
from bridge.runs.lanes import lane_of, submission_tags
from bridge.warm_dagster.internals import ConfigurableClass, ConfigurableClassData


class QueuesRuns(ConfigurableClass):
    """活在网页与守护进程里；从不载入用户代码。"""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._doorbell = Doorbell()
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        return cls(inst_data=inst_data, **config_value)

    def tag(self, instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
        """写下车道：经队列执行的运行都带着它。返回写了标签的运行。"""
        tags = submission_tags(instance, run)
        instance.add_run_tags(run.run_id, tags)
        return run.with_tags({**run.tags, **tags})

    def ring(self, run: DagsterRun) -> None:
        """让一个工人执行这个运行。"""
        self._doorbell.ring(run.run_id, lane_of(run))
