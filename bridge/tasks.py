"""公开的名字：`taskiq worker bridge.tasks:broker`；实现在 bridge.runs.tasks。"""

from bridge.runs.tasks import broker

__all__ = ["broker"]
