"""公开的名字：dagster.yaml 的 `module: bridge.run_launcher`；实现在 bridge.runs.run_queue。"""

from bridge.runs.run_queue import WarmRunLauncher

__all__ = ["WarmRunLauncher"]
