"""从流里读存下的消息：成批、按序、一条不漏，服务器中途重启也一样。"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from nats.js.api import StreamConfig

from bridge.errors import NatsUnavailableError
from bridge.jetstream import stored_messages
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, delete_message, read_stored, stored_message
from bridge.settings import BridgeSettings

from .conftest import NatsServer


@pytest.fixture
async def connection(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JetStreamConnection]:
    """一个流，s.a 与 s.b 交替，正文是序号 1 到 40；一批最多 7 条。"""
    monkeypatch.setattr(stored_messages, "_BATCH_SIZE", 7)
    link = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test")
    await link.open()
    await link.context.add_stream(StreamConfig(name="S", subjects=["s.>"]))
    for number in range(1, 41):
        await link.publish("s.a" if number % 2 else "s.b", str(number).encode(), message_id=str(number))
    yield link
    await link.close()


async def read(connection: JetStreamConnection, stretch: Stretch, *, subjects: tuple[str, ...] = ()) -> list[int]:
    batches = [batch async for batch in read_stored(connection, "S", stretch, subjects=subjects)]
    assert all(len(batch) <= 7 for batch in batches)
    return [int(message.data) for batch in batches for message in batch]


async def test_stretch_is_read_in_order_without_its_deleted_messages(connection: JetStreamConnection) -> None:
    for number in (1, 8, 9, 10, 40):
        await delete_message(connection, "S", number)
    await delete_message(connection, "S", 8)
    left = [number for number in range(1, 41) if number not in (1, 8, 9, 10, 40)]
    assert await read(connection, Stretch(1, 40)) == left
    assert await read(connection, Stretch(7, 12)) == [7, 11, 12]
    assert await read(connection, Stretch(8, 10)) == []
    assert await read(connection, Stretch(39, 500)) == [39]
    assert await read(connection, Stretch(300, 500)) == []


async def test_only_the_wanted_subjects_and_from_the_wanted_time_on(connection: JetStreamConnection) -> None:
    assert await read(connection, Stretch(30, 40), subjects=("s.b",)) == [30, 32, 34, 36, 38, 40]
    assert await read(connection, Stretch(38, 40), subjects=("s.a", "s.b")) == [38, 39, 40]
    first = await stored_message(connection, "S", 36)
    assert first is not None
    assert await read(connection, Stretch(first.stored_at, 40)) == [36, 37, 38, 39, 40]
    assert await read(connection, Stretch(datetime.now(UTC) + timedelta(hours=1), 40)) == []


async def test_what_is_published_meanwhile_is_not_read_and_no_consumer_stays(connection: JetStreamConnection) -> None:
    seen = []
    async for batch in read_stored(connection, "S", Stretch(1, 40)):
        seen += batch
        await connection.publish("s.a", b"late", message_id=f"late {len(seen)}")
    assert len(seen) == 40
    assert (await connection.context.stream_info("S")).state.consumer_count == 0


async def test_restart_of_the_server_in_between_loses_nothing(
    connection: JetStreamConnection, nats_server: NatsServer
) -> None:
    seen = []
    async for batch in read_stored(connection, "S", Stretch(1, 40)):
        seen += [int(message.data) for message in batch]
        if len(seen) == 14:
            nats_server.kill()
            nats_server.start()
    assert seen == list(range(1, 41))


async def test_lost_message_is_read_again(connection: JetStreamConnection) -> None:
    """服务器当作交出去了、我们没有收到的一条：不确认的消费者不会再投，从缺口重新读。"""
    lost: list[int] = []
    deliver = connection.client._build_message

    def lose_one(sid, subject, reply, data, headers):  # type: ignore[no-untyped-def]  # nats-py 的签名
        if data == b"10" and not lost:
            lost.append(10)
            return None
        return deliver(sid, subject, reply, data, headers)

    connection.client._build_message = lose_one  # type: ignore[method-assign]
    assert await read(connection, Stretch(1, 40)) == list(range(1, 41))
    assert lost == [10]


async def test_stream_that_hands_out_nothing_is_an_error_after_a_few_attempts(
    connection: JetStreamConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_messages, "_PATIENCE_SECONDS", 0.05)
    deliver = connection.client._build_message

    def lose_all(sid, subject, reply, data, headers):  # type: ignore[no-untyped-def]  # nats-py 的签名
        return None if data.isdigit() else deliver(sid, subject, reply, data, headers)

    connection.client._build_message = lose_all  # type: ignore[method-assign]
    with pytest.raises(NatsUnavailableError, match="stream S does not hand out its messages from 1 on"):
        await read(connection, Stretch(1, 40))
