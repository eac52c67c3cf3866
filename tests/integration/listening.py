"""一个真的监听器进程里的东西：监听器与对账者，对真 NATS 与真 PostgreSQL；没有工人。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from nats.js.api import RawStreamMsg

from bridge.events import DataImportCompleted, handlers
from bridge.events.due_bell import DueBell
from bridge.events.listener import Listener
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import stream_state
from bridge.queue.broker import SafeJetStreamBroker
from bridge.runs import reconciler
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings
from tests.the_three import graph


class Bridge:
    """一个数据库、一台 NATS；`listening()` 里监听器开着。"""

    def __init__(self, settings: BridgeSettings, engine: sa.Engine, etl_settings: EtlSettings) -> None:
        self.settings = settings
        self.engine = engine
        self.etl_settings = etl_settings
        self.connection = JetStreamConnection(settings, name="test")

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """像 `etl listen` 那样。"""
        stop = asyncio.Event()
        broker = SafeJetStreamBroker(self.settings)
        await broker.startup()
        bell = DueBell(broker, self.engine, self.etl_settings)
        reconciling = asyncio.create_task(reconciler.reconcile(stop, bell))
        running = asyncio.create_task(
            Listener(self.settings, handlers=handlers.handlers_of(graph), ring=bell.ring).run(stop)
        )
        try:
            yield
        finally:
            stop.set()
            try:
                await asyncio.wait_for(asyncio.gather(running, reconciling), 30)
            finally:
                await broker.shutdown()

    async def publish(self, import_id: UUID, *, event_id: UUID | None = None, **fields: object) -> DataImportCompleted:
        event = DataImportCompleted.model_validate({"import_id": import_id, "event_id": event_id or uuid4(), **fields})
        await self.connection.publish(DATA_IMPORT_COMPLETED, event.model_dump_json().encode(), message_id=str(uuid4()))
        return event

    async def publish_missing(self, count: int) -> None:
        """这么多合格的事件，导入都还没有。"""
        for _ in range(0, count, 200):
            await asyncio.gather(*(self.publish(uuid4()) for _ in range(min(count, 200))))

    def handled(self) -> dict[UUID, UUID]:
        """台账处理过的导入 → 它最新的事件。"""
        with self.engine.connect() as reading:
            return {row.import_id: row.event_id for row in reading.execute(sa.select(import_events))}

    def waiting(self) -> int:
        with self.engine.connect() as reading:
            count: int = reading.exec_driver_sql("SELECT count(*) FROM etl.waiting_events").scalar_one()
            return count

    async def eventually(self, condition: Callable[[], object], *, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.02)

    async def letters(self, count: int = 0) -> list[RawStreamMsg]:
        """等到有 count 封死信。"""
        async with asyncio.timeout(20):
            while True:
                state = await stream_state(self.connection, "EVENTS_DLQ")
                found = state.messages if state else 0
                if found >= count:
                    return [
                        await self.connection.context.get_msg("EVENTS_DLQ", number) for number in range(1, found + 1)
                    ]
                await asyncio.sleep(0.02)


@asynccontextmanager
async def open_bridge(
    settings: BridgeSettings, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    monkeypatch.setattr(handlers, "get_engine", lambda: engine)
    monkeypatch.setattr(handlers, "get_settings", lambda: etl_settings)
    made = Bridge(settings, engine, etl_settings)
    await made.connection.open()
    yield made
    await made.connection.close()
