"""两个版本并排：0.1.0 的监听器（真的轮子）与新的用同一个 EVENTS，谁也不吞掉对方的事件；退回去再升上来也一样。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.events import DataImportCompleted, Event, EventPublisher
from bridge.events.event_task_utils import Decision, Done, ReceivedEvent, event_task_handler
from bridge.events.handlers import handlers_of
from bridge.events.listener import Listener
from bridge.events.streams import CONSUMER, OLD_CONSUMER_SECONDS, consumer_name
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import consumer_info, ensure_consumer, stream_state
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
from tests.the_three import graph

from .conftest import NatsServer
from .old_version import OldProcess

NEW_SUBJECT = "events.inventory.completed"


@pytest.fixture
def old(tmp_path: Path, etl_settings: EtlSettings, nats_server: NatsServer) -> Iterator[OldProcess]:
    listener = OldProcess(tmp_path / "old", ETL_DATABASE_URL=etl_settings.database_url, ETL_NATS_URL=nats_server.url)
    yield listener
    listener.kill()


class Scene:
    """发布两种事件，看谁处理了什么。"""

    def __init__(self, settings: BridgeSettings, engine: sa.Engine, raw_data: RawData) -> None:
        self.settings = settings
        self._engine = engine
        self._raw_data = raw_data
        self.imports: set[UUID] = set()
        self.others: set[UUID] = set()
        self.seen: set[UUID] = set()

    async def publish(self, count: int) -> None:
        async with EventPublisher(self.settings) as publisher:
            for _ in range(count):
                import_id = self._raw_data.add_import([{}])
                self.imports.add(import_id)
                await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
                other = Event(status="completed")
                self.others.add(other.event_id)
                await publisher.publish(NEW_SUBJECT, other)

    def handled(self) -> set[UUID]:
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(import_events.c.import_id)))

    async def nothing_is_left(self) -> None:
        await eventually(lambda: self.handled() == self.imports and self.seen == self.others)

    @asynccontextmanager
    async def new_listener(self) -> AsyncIterator[None]:
        """认识一个旧的不认识的主题。"""

        @event_task_handler(subject=NEW_SUBJECT, event_type=Event, task_name="task")
        async def remember(events: Sequence[ReceivedEvent[Event]]) -> Sequence[Decision]:
            self.seen |= {received.event.event_id for received in events}
            return [Done(ring=False) for _ in events]

        async def ring(_task: str, _lane: str) -> None:
            """没有工人。"""

        stop = asyncio.Event()
        running = asyncio.create_task(
            Listener(self.settings, handlers=[*handlers_of(graph), remember], ring=ring).run(stop)
        )
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait_for(running, 30)


@pytest.fixture
def scene(
    nats_server: NatsServer,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    raw_data: RawData,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    monkeypatch.setattr("bridge.events.handlers.get_engine", lambda: engine)
    monkeypatch.setattr("bridge.events.handlers.get_settings", lambda: etl_settings)
    return Scene(BridgeSettings(nats_url=nats_server.url, event_ack_wait_seconds=2), engine, raw_data)


@pytest.fixture
async def connection(nats_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    link = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test")
    await link.open()
    yield link
    await link.close()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


async def test_old_and_new_listener_side_by_side_lose_nothing(
    old: OldProcess, scene: Scene, connection: JetStreamConnection
) -> None:
    old.start()
    await eventually(lambda: old.is_ready)
    await scene.publish(3)
    await eventually(lambda: scene.handled() == scene.imports)
    handled_by_old = 6
    async with scene.new_listener():
        await scene.publish(10)
        await scene.nothing_is_left()
        # 旧的已经确认过的不再来一遍；新的还没开始时，旧的可能又确认了几条
        imports = await consumer_info(connection, "EVENTS", consumer_name(scene.settings, DATA_IMPORT_COMPLETED))
        assert imports is not None
        assert imports.config.opt_start_seq is not None
        assert imports.config.opt_start_seq >= handled_by_old - 1
        old.kill()
        old.start()  # 重启会把共用的消费者改回它自己的过滤
        await eventually(lambda: old.is_ready)
        await scene.publish(10)
        await scene.nothing_is_left()
    await scene.publish(5)  # 退回 0.1.0：它认识的照常处理，不认识的留着
    await eventually(lambda: scene.handled() == scene.imports)
    old.kill()
    async with scene.new_listener():
        await scene.nothing_is_left()
        retired = await consumer_info(connection, "EVENTS", CONSUMER)
        assert retired is not None
        assert retired.config.inactive_threshold == OLD_CONSUMER_SECONDS
    letters = await stream_state(connection, "EVENTS_DLQ")
    assert letters is not None
    assert letters.messages == 0


async def test_consumer_that_several_listeners_create_at_once_starts_where_the_first_said(
    connection: JetStreamConnection,
) -> None:
    """0.1.0 的监听器正在确认：各算出一个起点，都不算错。"""
    await connection.context.add_stream(name="EVENTS", subjects=["events.>"])
    wanted = [
        ConsumerConfig(
            durable_name="x",
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=sequence,
            ack_policy=AckPolicy.EXPLICIT,
        )
        for sequence in range(1, 6)
    ]
    made = await asyncio.gather(*(ensure_consumer(connection, "EVENTS", config) for config in wanted))
    assert len({info.config.opt_start_seq for info in made}) == 1
