"""公开的名字：dagster.yaml 的 `module: bridge.run_coordinator`；实现在 bridge.runs.coordinator。"""

from bridge.runs.coordinator import TaskQueueRunCoordinator

__all__ = ["TaskQueueRunCoordinator"]
