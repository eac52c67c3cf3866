"""发布事件：校验、去重、等到流存下才返回；外围应用、命令行与发件箱共用。"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from bridge.errors import InvalidEventError, PayloadTooLargeError
from bridge.events.envelope import event_type
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings, get_bridge_settings
from etl_assets.core.asset_events import Event
from etl_assets.core.tracing import current_headers, span


@dataclass(frozen=True)
class PublishedEvent:
    """流存下的位置；duplicate 表示这个 event_id 已经在流里，没有再存一份。"""

    stream: str
    sequence: int
    duplicate: bool


class EventPublisher:
    """一条连接发许多事件：`async with EventPublisher() as publisher`。"""

    def __init__(self, settings: BridgeSettings | None = None) -> None:
        self._settings = settings or get_bridge_settings()
        self._connection = JetStreamConnection(self._settings, name="publisher")

    async def __aenter__(self) -> Self:
        await self._connection.open(only_publishes=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def publish(self, subject: str, event: Event) -> PublishedEvent:
        """存进流里才返回；同一个 event_id 再发一次没有害处。"""
        wanted = event_type(subject)
        if not isinstance(event, wanted):
            raise InvalidEventError(f"{subject} carries {wanted.__name__}, not {type(event).__name__}")
        data = event.model_dump_json(exclude_none=True).encode()
        # 在这里就拒：应用自己的 EVENTS 也许不设上限，存得进去，监听器却当垃圾埋掉
        if len(data) > self._settings.event_max_bytes:
            limit = f"ETL_EVENT_MAX_BYTES, {self._settings.event_max_bytes} bytes"
            raise PayloadTooLargeError(subject, size_bytes=len(data), limit=limit)
        with span(f"publish {subject}", event_id=str(event.event_id)):
            stored = await self._connection.publish(
                subject, data, message_id=str(event.event_id), headers=current_headers()
            )
        return PublishedEvent(stored.stream, stored.seq, bool(stored.duplicate))


async def publish_event(subject: str, event: Event, *, settings: BridgeSettings | None = None) -> PublishedEvent:
    """连上、发一个、断开；要发许多时用 EventPublisher。"""
    async with EventPublisher(settings) as publisher:
        return await publisher.publish(subject, event)


def publish_event_sync(subject: str, event: Event, *, settings: BridgeSettings | None = None) -> PublishedEvent:
    """给没有事件循环的代码；在有事件循环的线程里也能调，只是会挡住它。"""
    with ThreadPoolExecutor(1, thread_name_prefix="publish-event") as pool:
        return pool.submit(asyncio.run, publish_event(subject, event, settings=settings)).result()
