"""公开的名字：`taskiq worker bridge.tasks:broker --receiver bridge.broker:SafeReceiver`；实现在 bridge.queue.receiver。"""

from bridge.queue.receiver import SafeReceiver

__all__ = ["SafeReceiver"]
