"""公开的名字：dagster.yaml 的 `module: bridge.run_coordinator`；实现在 bridge.runs.run_queue。"""

from bridge.runs.run_queue import TaskQueueRunCoordinator

__all__ = ["TaskQueueRunCoordinator"]
