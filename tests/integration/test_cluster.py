"""三节点的 NATS：流的领导者被 kill -9，选出新的之前谁也不说没有流；发布、监听、任务都照旧，没有死信。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import pytest
import structlog
from nats.js.api import StreamConfig

from bridge.errors import NatsUnavailableError, StreamMissingError
from bridge.events import DataImportCompleted, EventPublisher
from bridge.events.event_task_utils import Decision, Done, ReceivedEvent, event_task_handler
from bridge.events.listener import Listener
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream, stream_config, stream_state, stream_use
from bridge.nats_names import EVENTS_STREAM
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.receiver import SafeReceiver
from bridge.settings import BridgeSettings

from .nats_cluster import NatsCluster


@pytest.fixture
def settings(nats_cluster: NatsCluster) -> BridgeSettings:
    return BridgeSettings(
        nats_url=nats_cluster.url,
        nats_replicas=3,
        event_ack_wait_seconds=3,
        task_ack_wait_seconds=3,
        event_retry_delay_seconds=0.1,
    )


async def no_answer(ask: Callable[[], Awaitable[object]]) -> None:
    """问到没有人答为止：剩下的那一个，有一会儿还以为自己领导着。"""
    async with asyncio.timeout(30):
        while True:
            try:
                await ask()
            except NatsUnavailableError:
                return


class Listened:
    """一个监听器收到的导入。"""

    def __init__(self, settings: BridgeSettings) -> None:
        self.import_ids: set[UUID] = set()

        @event_task_handler(subject=DATA_IMPORT_COMPLETED, event_type=DataImportCompleted, task_name="task")
        async def remember(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
            self.import_ids |= {received.event.import_id for received in events}
            return [Done() for _ in events]

        async def ring(_task: str, _lane: str) -> None:
            """没有工人。"""

        self._stop = asyncio.Event()
        self._listener = Listener(settings, handlers=[remember], ring=ring)

    async def __aenter__(self) -> Listened:
        self._running = asyncio.create_task(self._listener.run(self._stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.wait_for(self._running, 40)

    async def has_all(self, import_ids: Sequence[UUID]) -> None:
        async with asyncio.timeout(60):
            while not self.import_ids >= set(import_ids):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def connected(settings: BridgeSettings) -> AsyncIterator[JetStreamConnection]:
    connection = JetStreamConnection(settings, name="test")
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


async def letters(settings: BridgeSettings) -> int:
    async with connected(settings) as connection:
        states = [await stream_state(connection, name) for name in ("EVENTS_DLQ", "TASKS_DLQ")]
    return sum(state.messages for state in states if state)


async def test_publisher_and_listener_live_through_the_death_of_the_streams_leader(
    nats_cluster: NatsCluster, settings: BridgeSettings
) -> None:
    """领导者一死就发布，不等新的选出来；离它回来还早，事件已经处理了。"""
    published: list[UUID] = []
    with structlog.testing.capture_logs() as logs:
        async with Listened(settings) as listened, EventPublisher(settings) as publisher:
            async with asyncio.timeout(20):
                while not any(line["event"] == "ready" for line in logs):
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(nats_cluster.kill_leader, EVENTS_STREAM)
            for _ in range(5):
                event = DataImportCompleted(import_id=uuid4())
                published.append(event.import_id)
                await publisher.publish(DATA_IMPORT_COMPLETED, event)
            await listened.has_all(published)
            await asyncio.to_thread(nats_cluster.restart)
    async with connected(settings) as connection:
        assert (await stream_config(connection, EVENTS_STREAM) or {})["num_replicas"] == 3
    assert await letters(settings) == 0
    assert not [line for line in logs if "does not exist" in str(line) or "stores subject" in str(line)]


async def test_task_lives_through_the_death_of_the_streams_leader(
    nats_cluster: NatsCluster, settings: BridgeSettings
) -> None:
    """执行之中领导者被杀：确认、再敲的门铃都等到新的选出来。"""
    worker = SafeJetStreamBroker(settings)
    ran: list[str] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    @worker.task(task_name="work")
    async def work(text: str) -> None:
        started.set()
        await go_on.wait()
        if text == "first":
            await worker.ring("work", "interactive", "second")
        ran.append(text)

    worker.is_worker_process = True
    stop = asyncio.Event()
    running = asyncio.create_task(SafeReceiver(worker, wait_tasks_timeout=10).listen(stop))
    client = SafeJetStreamBroker(settings)
    await client.startup()
    await client.ring("work", "interactive", "first")
    await asyncio.wait_for(started.wait(), 30)
    await asyncio.to_thread(nats_cluster.kill_leader, "TASKS")
    go_on.set()
    async with asyncio.timeout(60):
        while "second" not in ran:
            await asyncio.sleep(0.05)
        while True:
            try:
                state = await stream_state(client.connection, "TASKS")
            except NatsUnavailableError:
                continue
            if state is not None and state.messages == 0:
                break
            await asyncio.sleep(0.05)
    stop.set()
    await asyncio.wait_for(running, 40)
    await worker.shutdown()
    await client.shutdown()
    assert set(ran) == {"first", "second"}
    assert await letters(settings) == 0


async def test_missing_stream_is_said_only_when_the_servers_say_so(
    nats_cluster: NatsCluster, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """没有多数就没有领导者：不知道有没有流，所以只说没存下，而且是暂时的；流的现状、建流也一样。"""
    async with connected(settings) as connection:
        await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"], num_replicas=3))
        await connection.context.add_stream(StreamConfig(name="ALONE", subjects=["alone.>"]))
        uses = [await stream_use(connection, name) for name in ("EVENTS", "ALONE")]
        assert [use.has_one_copy for use in uses if use] == [False, True]  # etl doctor 说的就是这个
        with pytest.raises(StreamMissingError):
            await connection.publish("nobody.stores.this", b"{}", message_id="1")
        victim = await asyncio.to_thread(nats_cluster.kill_leader, "EVENTS")
        second = next(name for name in ("n0", "n1", "n2") if name != victim)
        await asyncio.to_thread(nats_cluster.kill, second)
        monkeypatch.setattr("bridge.jetstream.connection.PUBLISH_SECONDS", 2.5)
        monkeypatch.setattr("bridge.jetstream.connection.MANAGE_SECONDS", 1.0)
        start = time.monotonic()
        with pytest.raises(NatsUnavailableError):
            await connection.publish(DATA_IMPORT_COMPLETED, b"{}", message_id="2")
        assert time.monotonic() - start < 20
        asks: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: stream_config(connection, "NEW"),
            lambda: ensure_stream(connection, StreamConfig(name="NEW", subjects=["new.>"])),
        )
        for ask in asks:
            await no_answer(ask)
        monkeypatch.undo()
        await asyncio.to_thread(nats_cluster.restart)
        assert (await connection.publish(DATA_IMPORT_COMPLETED, b"{}", message_id="2")).stream == "EVENTS"
