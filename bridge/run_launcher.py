"""公开的名字：dagster.yaml 的 `module: bridge.run_launcher`；实现在 bridge.runs.launcher。"""

from bridge.runs.launcher import WarmRunLauncher

__all__ = ["WarmRunLauncher"]
