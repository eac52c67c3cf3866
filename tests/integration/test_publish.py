"""发布事件与连接 NATS：存下才返回，出错只有一句话。"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import DiscardPolicy, StreamConfig
from taskiq import TaskiqState

from bridge.errors import (
    InvalidEventError,
    InvalidSubjectError,
    NatsRefusedError,
    NatsUnavailableError,
    PayloadTooLargeError,
    StreamConflictError,
    StreamFullError,
    StreamMissingError,
)
from bridge.events import DataImportCompleted, Event, EventPublisher, publish_event, publish_event_sync
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.jetstream import connection as jetstream
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream, stream_config, stream_use
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.streams import task_streams
from bridge.runs import tasks
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import SettingsError
from etl_assets.ledger.outbox import Completion, add_completion, read_unpublished

from .conftest import PASSWORD, NatsServer


@pytest.fixture
async def connection(nats_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    link = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test")
    await link.open()
    yield link
    await link.close()


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(nats_url=nats_server.url, connect_timeout_seconds=1)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """占着端口却从不说话的服务。"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_published_event_is_stored_once_however_often_it_is_sent(
    connection: JetStreamConnection, settings: BridgeSettings
) -> None:
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    event = DataImportCompleted.model_validate({"import_id": uuid4(), "shop": "中文店"})
    async with EventPublisher(settings) as publisher:
        first = await publisher.publish(DATA_IMPORT_COMPLETED, event)
        again = await publisher.publish(DATA_IMPORT_COMPLETED, event)
    assert (first.stream, first.sequence, first.duplicate) == ("EVENTS", 1, False)
    assert (again.sequence, again.duplicate) == (1, True)
    stored = json.loads((await connection.context.get_msg("EVENTS", 1)).data or b"")
    assert UUID(stored["event_id"]) == event.event_id
    assert (stored["event_version"], stored["status"], stored["shop"]) == ("1.0", "completed", "中文店")


async def test_sync_publish_works_with_and_without_a_running_loop(
    connection: JetStreamConnection, settings: BridgeSettings
) -> None:
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    outside = await asyncio.to_thread(
        publish_event_sync, DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=uuid4()), settings=settings
    )
    inside = publish_event_sync(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=uuid4()), settings=settings)
    assert (outside.sequence, inside.sequence) == (1, 2)


@pytest.mark.parametrize(
    "subject", [f"{DATA_IMPORT_COMPLETED}.", "events..x", ".events", "events.*", "events.>", "events.a b", ""]
)
async def test_subject_that_nobody_could_hear_is_refused(
    connection: JetStreamConnection, settings: BridgeSettings, subject: str
) -> None:
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    async with EventPublisher(settings) as publisher:
        with pytest.raises(InvalidSubjectError, match="is not a subject to publish to"):
            await publisher.publish(subject, Event(status="x"))
    assert (await connection.context.stream_info("EVENTS")).state.messages == 0


async def test_publisher_needs_no_more_than_its_subjects_and_its_inbox(tmp_path: Path) -> None:
    """应用的用户不许碰 $JS.API：照样发得出去；没有流时说没存下，不说没有流——它问不了。"""
    only_events = {"publish": ["events.>"], "subscribe": ["_INBOX.>"]}
    users = [{"user": "etl", "password": "s3cret"}, {"user": "app", "password": "s3cret", "permissions": only_events}]
    server = NatsServer(tmp_path, config={"authorization": {"users": users}})
    server.start()
    admin = JetStreamConnection(BridgeSettings(nats_url=server.url), name="test")
    try:
        await admin.open()
        await admin.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
        settings = BridgeSettings(nats_url=server.url.replace("etl:", "app:"))
        stored = await publish_event(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=uuid4()), settings=settings)
        assert (stored.stream, stored.sequence) == ("EVENTS", 1)
    finally:
        await admin.close()
        server.kill()


async def test_event_of_the_wrong_type_is_refused_before_it_is_sent(settings: BridgeSettings) -> None:
    async with EventPublisher(settings) as publisher:
        with pytest.raises(InvalidEventError, match="carries EtlCompleted, not DataImportCompleted"):
            await publisher.publish(ORDERS_ETL_COMPLETED, DataImportCompleted(import_id=uuid4()))


async def test_publishing_without_a_stream_says_so(settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream, "NO_STREAM_SECONDS", 0.1)
    with pytest.raises(
        StreamMissingError, match=r"no JetStream stream stores subject events\.data_import\.completed: start"
    ):
        await publish_event(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=uuid4()), settings=settings)


async def test_too_large_event_is_refused_and_the_connection_stays_usable(
    connection: JetStreamConnection, settings: BridgeSettings
) -> None:
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"], max_msg_size=2_000))
    async with EventPublisher(settings) as publisher:
        with pytest.raises(PayloadTooLargeError, match="exceeds ETL_EVENT_MAX_BYTES, 262144 bytes: "):
            await publisher.publish("events.other", Event.model_validate({"status": "x", "note": "n" * 300_000}))
        with pytest.raises(PayloadTooLargeError, match="exceeds the max_msg_size of its stream"):
            await publisher.publish("events.other", Event.model_validate({"status": "x", "note": "n" * 3_000}))
        assert (await publisher.publish("events.other", Event(status="x"))).sequence == 1
    # 正文刚好够、加上消息头就超：服务器会因此断开连接，所以在这边就拒绝
    with pytest.raises(PayloadTooLargeError, match="exceeds max_payload of NATS, 1048576 bytes"):
        await connection.publish("events.other", b"x" * connection.client.max_payload, message_id="large")


async def test_full_stream_refuses_new_messages_and_keeps_the_old(connection: JetStreamConnection) -> None:
    await connection.context.add_stream(StreamConfig(name="Q", subjects=["q.>"], max_msgs=1, discard=DiscardPolicy.NEW))
    await connection.publish("q.a", b"old", message_id="1")
    with pytest.raises(StreamFullError, match=r"the stream of q\.a is full"):
        await connection.publish("q.a", b"new", message_id="2")
    assert (await connection.context.get_msg("Q", 1)).data == b"old"


async def test_account_without_room_is_a_full_stream_too(tmp_path: Path) -> None:
    """腾出地方就好：不是流设错了，完成事件也就不会一个个被放在一边。"""
    users = [{"user": "etl", "password": PASSWORD}]
    server = NatsServer(tmp_path, config={"accounts": {"A": {"jetstream": {"max_store": 500_000}, "users": users}}})
    server.start()
    connection = JetStreamConnection(BridgeSettings(nats_url=server.url), name="test")
    try:
        await connection.open()
        await connection.context.add_stream(StreamConfig(name="Q", subjects=["q.>"]))
        for number in range(4):
            await connection.publish("q.a", b"x" * 100_000, message_id=str(number))
        with pytest.raises(StreamFullError, match=r"the stream of q\.a is full"):
            await connection.publish("q.a", b"x" * 100_000, message_id="one more")
    finally:
        await connection.close()
        server.kill()


async def test_publishing_survives_a_restart_of_the_server(
    connection: JetStreamConnection, settings: BridgeSettings, nats_server: NatsServer
) -> None:
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    async with EventPublisher(settings) as publisher:
        nats_server.kill()
        sending = asyncio.create_task(publisher.publish("events.other", Event(status="x")))
        await asyncio.sleep(0)
        nats_server.start()
        await sending
    assert (await connection.context.stream_info("EVENTS")).state.messages == 1


async def test_publishing_gives_up_after_a_bounded_time(
    connection: JetStreamConnection, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "PUBLISH_SECONDS", 0.2)
    monkeypatch.setattr(jetstream, "ANSWER_SECONDS", 0.2)
    nats_server.kill()
    with pytest.raises(NatsUnavailableError, match=r"NATS at nats://127.*did not store a message for events\.x"):
        await connection.publish("events.x", b"{}", message_id="1")


async def test_lost_connection_is_logged_once_per_cause(
    connection: JetStreamConnection, nats_server: NatsServer
) -> None:
    with structlog.testing.capture_logs() as logs:
        nats_server.kill()
        # 重连失败了几次之后，同一句话仍只有一行
        while max(server.reconnects for server in connection.client.server_pool) < 3:
            await asyncio.sleep(0.05)
        nats_server.start()
        while not connection.client.is_connected:
            await asyncio.sleep(0.05)
    causes = [line["cause"] for line in logs if line["event"] == "nats trouble"]
    assert len(causes) == len(set(causes))
    assert [line["event"] for line in logs if line["event"] != "nats trouble"] == [
        "nats disconnected",
        "nats reconnected",
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nats://etl:wrong@127.0.0.1:{port}", "refuses the user or password: correct ETL_NATS_URL"),
        ("nats://127.0.0.1:{port}", "refuses the user or password: correct ETL_NATS_URL"),
    ],
)
async def test_wrong_password_is_one_sentence_at_once(nats_server: NatsServer, url: str, message: str) -> None:
    settings = BridgeSettings(nats_url=url.format(port=nats_server.port), connect_timeout_seconds=30)
    with pytest.raises(NatsRefusedError, match=message) as raised:
        await JetStreamConnection(settings, name="test").open()
    assert "wrong" not in str(raised.value)


async def test_unreachable_server_is_one_sentence(nats_server: NatsServer, silent_port: int) -> None:
    nats_server.kill()
    for port in (nats_server.port, silent_port):
        settings = BridgeSettings(nats_url=f"nats://etl:s3cret@127.0.0.1:{port}", connect_timeout_seconds=1)
        with pytest.raises(NatsUnavailableError, match=r"cannot reach NATS at .* within 1 s") as raised:
            await JetStreamConnection(settings, name="test").open()
        assert "s3cret" not in str(raised.value)


async def test_server_without_jetstream_is_refused(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, jetstream=False)
    server.start()
    try:
        with pytest.raises(NatsRefusedError, match="offers no JetStream"):
            await JetStreamConnection(BridgeSettings(nats_url=server.url), name="test").open()
    finally:
        server.kill()


async def test_too_old_server_is_refused(settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream, "OLDEST_SERVER", (99, 0))
    with pytest.raises(NatsRefusedError, match=r"is version .*: upgrade it"):
        await JetStreamConnection(settings, name="test").open()


async def test_missing_url_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="ETL_NATS_URL is not set"):
        await JetStreamConnection(BridgeSettings(nats_url=""), name="test").open()


async def test_limits_that_an_operator_changed_stay(connection: JetStreamConnection, settings: BridgeSettings) -> None:
    """每次启动都会再看一遍流：放大的、缩小的、我们不管的，都照运维改的那样。"""
    for stream in task_streams(settings):
        await ensure_stream(connection, stream)
    changed = {
        "TASKS": {
            "max_bytes": 1 << 30,
            "max_msgs": 5_000_000,
            "compression": "s2",
            "metadata": {"owner": "ops"},
            "allow_direct": True,
        },
        "TASKS_DLQ": {"max_bytes": 1 << 20, "max_msg_size": 500_000},
    }
    for name, fields in changed.items():
        await update_raw(connection, name, fields)
    before = {name: await stream_config(connection, name) for name in changed}
    for stream in task_streams(settings):
        await ensure_stream(connection, stream)
    assert {name: await stream_config(connection, name) for name in changed} == before
    assert all(
        (before[name] or {})[field] == value
        for name in changed
        for field, value in changed[name].items()
        if field != "metadata"
    )
    assert (before["TASKS"] or {})["metadata"]["owner"] == "ops"


async def test_what_correctness_needs_is_set_right(connection: JetStreamConnection, settings: BridgeSettings) -> None:
    """0.1.0 的死信流丢旧的、三十天过期；改过来，一封也不少。"""
    await connection.context.add_stream(
        StreamConfig(
            name="TASKS_DLQ", subjects=["tasks_dlq.bulk"], max_bytes=1 << 20, max_age=86_400, discard=DiscardPolicy.OLD
        )
    )
    await connection.publish("tasks_dlq.bulk", b"letter", message_id="1")
    for stream in task_streams(settings):
        await ensure_stream(connection, stream)
    config = await stream_config(connection, "TASKS_DLQ") or {}
    assert (config["subjects"], config["discard"], config["max_age"]) == (["tasks_dlq.>"], "new", 0)
    assert (config["max_bytes"], config["duplicate_window"]) == (1 << 20, 600_000_000_000)
    assert (await connection.context.stream_info("TASKS_DLQ")).state.messages == 1


async def test_stream_that_two_processes_create_at_once_is_there_for_both(settings: BridgeSettings) -> None:
    async def create(max_bytes: int) -> None:
        link = JetStreamConnection(settings, name="test")
        await link.open()
        await ensure_stream(link, StreamConfig(name="MINE", subjects=["mine.>"], max_bytes=max_bytes))
        await link.close()

    await asyncio.gather(*(create(1_000_000 + number) for number in range(5)))


async def update_raw(connection: JetStreamConnection, name: str, fields: dict[str, object]) -> None:
    """像运维的工具那样改流：没提到的照旧。"""
    config = (await stream_config(connection, name) or {}) | fields
    answer = json.loads(
        (await connection.client.request(f"$JS.API.STREAM.UPDATE.{name}", json.dumps(config).encode())).data
    )
    assert "error" not in answer, answer


async def test_replicas_without_a_cluster_are_refused_with_what_to_do(settings: BridgeSettings) -> None:
    link = JetStreamConnection(settings.model_copy(update={"nats_replicas": 3}), name="test")
    await link.open()
    with pytest.raises(StreamConflictError, match="set ETL_NATS_REPLICAS to 1"):
        await ensure_stream(link, StreamConfig(name="MINE", subjects=["mine.>"]))
    await link.context.add_stream(StreamConfig(name="MINE", subjects=["mine.>"]))
    use = await stream_use(link, "MINE")
    assert use is not None
    assert not use.has_one_copy
    await link.close()


async def test_account_without_jetstream_is_refused_at_once(tmp_path: Path) -> None:
    server = NatsServer(
        tmp_path,
        config={"accounts": {"PLAIN": {"users": [{"user": "etl", "password": "s3cret"}]}, "JS": {"jetstream": True}}},
    )
    server.start()
    try:
        with pytest.raises(NatsRefusedError, match="offers no JetStream"):
            await JetStreamConnection(BridgeSettings(nats_url=server.url), name="test").open()
    finally:
        server.kill()


async def test_stream_in_the_way_is_named(connection: JetStreamConnection) -> None:
    await connection.context.add_stream(StreamConfig(name="THEIRS", subjects=["mine.>"]))
    with pytest.raises(
        StreamConflictError, match="stream MINE cannot be used: subjects overlap with an existing stream"
    ):
        await ensure_stream(connection, StreamConfig(name="MINE", subjects=["mine.>"]))


# ---- 完成事件 --------------------------------------------------------------------


@pytest.fixture
async def idle_worker(
    engine: sa.Engine, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TaskiqState]:
    """装好了、没有任务的工人：发件箱里有一个事件。"""
    broker = SafeJetStreamBroker(settings)
    await broker.startup()
    await ensure_stream(broker.connection, StreamConfig(name="EVENTS", subjects=["events.>"]))
    monkeypatch.setattr(tasks, "broker", broker)
    monkeypatch.setattr(RunWorker, "load", lambda _settings: SimpleNamespace(engine=engine))
    add_to_outbox(engine)
    await tasks.load_worker(broker.state)
    yield broker.state
    await broker.shutdown()


def add_to_outbox(engine: sa.Engine) -> None:
    day = date(2026, 1, 5)
    completion = Completion(
        asset="orders", days=DayRange(day, day), run_id=str(uuid4()), status="success", downstream="pending"
    )
    with engine.begin() as transaction:
        add_completion(transaction, "public", completion)


def unpublished(engine: sa.Engine) -> int:
    with engine.connect() as reading:
        return len(read_unpublished(reading, limit=10))


async def test_completion_events_are_published_beside_the_next_task(
    idle_worker: TaskiqState, engine: sa.Engine, connection: JetStreamConnection
) -> None:
    for stored in (1, 2):
        idle_worker.unpublished.set()
        async with asyncio.timeout(10):
            while unpublished(engine):
                await asyncio.sleep(0.01)
        assert (await connection.context.stream_info("EVENTS")).state.messages == stored
        add_to_outbox(engine)
    await tasks.unload_worker(idle_worker)


async def test_a_worker_that_stops_publishes_what_its_last_run_left(
    idle_worker: TaskiqState, engine: sa.Engine, connection: JetStreamConnection
) -> None:
    assert unpublished(engine) == 1
    await tasks.unload_worker(idle_worker)
    assert unpublished(engine) == 0
    assert (await connection.context.stream_info("EVENTS")).state.messages == 1


async def test_completion_events_outlast_a_server_that_is_away(
    idle_worker: TaskiqState, engine: sa.Engine, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats_server.kill()
    with monkeypatch.context() as impatient, structlog.testing.capture_logs() as logs:
        impatient.setattr(jetstream, "PUBLISH_SECONDS", 0.2)
        impatient.setattr(jetstream, "ANSWER_SECONDS", 0.2)
        idle_worker.unpublished.set()
        async with asyncio.timeout(30):
            while not any(line["event"] == "completion events cannot be published now" for line in logs):
                await asyncio.sleep(0.01)
    assert unpublished(engine) == 1
    nats_server.start()
    async with asyncio.timeout(30):
        while unpublished(engine):
            idle_worker.unpublished.set()
            await asyncio.sleep(0.01)
    await tasks.unload_worker(idle_worker)
