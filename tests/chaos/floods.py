"""坏的发布者：一阵阵垃圾，和一阵阵没有导入的事件；流存下的都记着，最后要一一找到它们的死信。"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID, uuid4

from bridge.errors import BridgeError
from bridge.events import DataImportCompleted
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings

GARBAGE_MARK = b"garbage "
_LARGEST_GARBAGE_BYTES = 20_000  # 旧版本整个地存进死信
_AT_ONCE = 50


class Floods:
    """两种急流；NATS 不在时发不出的不算。"""

    def __init__(self, settings: BridgeSettings) -> None:
        self.waiting: set[UUID] = set()
        """存下了的事件说的导入：从来没有过。"""
        self.garbage: set[str] = set()
        """存下了的垃圾的标记。"""
        self._settings = settings

    def pour_waiting(self, count: int) -> None:
        """合约定的事件，只是导入永远不会来。"""

        async def publish(connection: JetStreamConnection) -> None:
            event = DataImportCompleted(import_id=uuid4())
            await _publish(connection, event.model_dump_json().encode())
            self.waiting.add(event.import_id)

        asyncio.run(self._pour(publish, count))

    def pour_garbage(self, count: int) -> None:
        """不是 JSON 的字节，从几百个到两万个。"""
        sizes = iter(range(100, _LARGEST_GARBAGE_BYTES, max(1, (_LARGEST_GARBAGE_BYTES - 100) // count)))

        async def publish(connection: JetStreamConnection) -> None:
            mark = str(uuid4())
            await _publish(connection, GARBAGE_MARK + mark.encode() + b"\xff" * next(sizes, 100))
            self.garbage.add(mark)

        asyncio.run(self._pour(publish, count))

    async def _pour(self, publish: Callable[[JetStreamConnection], Coroutine[Any, Any, None]], count: int) -> None:
        connection = JetStreamConnection(self._settings, name="flood")
        try:
            await connection.open()
            for first in range(0, count, _AT_ONCE):
                batch = [publish(connection) for _ in range(min(_AT_ONCE, count - first))]
                outcomes = await asyncio.gather(*batch, return_exceptions=True)
                if any(isinstance(outcome, BridgeError) for outcome in outcomes):
                    return
        except BridgeError:
            return
        finally:
            await connection.close()


async def _publish(connection: JetStreamConnection, data: bytes) -> None:
    await connection.publish(DATA_IMPORT_COMPLETED, data, message_id=str(uuid4()))
