"""拉取对真 NATS：等的人来来去去，消息一条也不落空，都是第一次投递就到手。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.pull import Puller
from bridge.jetstream.streams import consumer_info, ensure_consumer, ensure_stream
from bridge.settings import BridgeSettings

from .conftest import NatsServer

STREAM, CONSUMER = "NUMBERS", "reader"


@asynccontextmanager
async def connected(nats_server: NatsServer, name: str) -> AsyncIterator[JetStreamConnection]:
    connection = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name=name)
    await connection.open()
    yield connection
    await connection.close()


@pytest.fixture
async def publisher(nats_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    async with connected(nats_server, "publisher") as connection:
        await ensure_stream(connection, StreamConfig(name=STREAM, subjects=["number"]))
        await ensure_consumer(
            connection, STREAM, ConsumerConfig(durable_name=CONSUMER, ack_policy=AckPolicy.EXPLICIT, ack_wait=60)
        )
        yield connection


async def nothing_to_restore() -> None:
    raise AssertionError("stream and consumer are there")


async def publish(connection: JetStreamConnection, count: int) -> None:
    """间隔从 0 到 1.9 毫秒，不与等待的节拍合拍。"""
    for number in range(count):
        await connection.publish("number", b"%d" % number, message_id=str(number))
        await asyncio.sleep(number * 7 % 20 * 0.0001)


async def test_messages_published_while_a_batch_lingers_all_arrive_with_their_first_delivery(
    nats_server: NatsServer, publisher: JetStreamConnection
) -> None:
    count = 1_000
    received: list[Msg] = []
    async with connected(nats_server, "reader") as connection, asyncio.timeout(30):
        puller = Puller(connection, STREAM, restore=nothing_to_restore)
        publishing = asyncio.create_task(publish(publisher, count))
        while len(received) < count:
            received += await puller.wait([CONSUMER], batch=50, linger_seconds=0.001)
        await publishing
    assert sorted(int(message.data) for message in received) == list(range(count))
    assert {message.metadata.num_delivered for message in received} == {1}


async def test_a_wait_that_is_cancelled_again_and_again_loses_nothing(
    nats_server: NatsServer, publisher: JetStreamConnection
) -> None:
    count = 500
    received: list[Msg] = []
    waits = 0
    async with connected(nats_server, "reader") as connection, asyncio.timeout(30):
        puller = Puller(connection, STREAM, restore=nothing_to_restore)
        publishing = asyncio.create_task(publish(publisher, count))
        while len(received) < count:
            waits += 1
            try:
                async with asyncio.timeout(waits * 11 % 30 * 0.0001):
                    received += await puller.wait([CONSUMER])
            except TimeoutError:
                received += puller.take_leftovers()
        await publishing
    assert sorted(int(message.data) for message in received) == list(range(count))
    assert {message.metadata.num_delivered for message in received} == {1}


async def test_closing_hands_over_what_was_already_on_its_way(
    nats_server: NatsServer, publisher: JetStreamConnection
) -> None:
    returned: list[Msg] = []
    async with connected(nats_server, "reader") as connection, asyncio.timeout(30):
        puller = Puller(connection, STREAM, restore=nothing_to_restore, unwanted=returned.append)
        await publisher.publish("number", b"0", message_id="0")
        assert await puller.wait([CONSUMER], batch=3)
        await publisher.publish("number", b"1", message_id="1")
        # 存下了不等于已经发出：退订抢在前面的话，它要等 ack_wait
        while (info := await consumer_info(publisher, STREAM, CONSUMER)) is None or info.num_ack_pending != 2:
            await asyncio.sleep(0.001)
        await puller.close()
    assert [message.data for message in returned] == [b"1"]


async def test_batch_is_bounded_in_bytes_too(
    nats_server: NatsServer, publisher: JetStreamConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """一千条大消息不会一次都到；字节给够了不算出事，接着要就接着来。"""
    monkeypatch.setattr(Puller, "BATCH_BYTES", 1)  # 于是是 max_payload 的两倍：2 MiB
    for number in range(10):
        await publisher.publish("number", b"x" * 500_000, message_id=str(number))
    sizes: list[int] = []
    with structlog.testing.capture_logs() as logs:
        async with connected(nats_server, "reader") as connection, asyncio.timeout(30):
            puller = Puller(connection, STREAM, restore=nothing_to_restore)
            while sum(sizes) < 10:
                messages = await puller.wait([CONSUMER], batch=1_000, linger_seconds=0.3)
                sizes.append(len(messages))
                for message in messages:
                    await message.ack()
    assert max(sizes) <= 4
    assert not [line for line in logs if line["log_level"] == "warning"]


async def test_limit_of_the_consumer_is_said_and_does_not_spin(
    nats_server: NatsServer, publisher: JetStreamConnection
) -> None:
    """运维给消费者设了 max_bytes：要得比它多的请求立刻被拒，一直不停地再要就占满一个核。"""
    config = ConsumerConfig(durable_name=CONSUMER, ack_policy=AckPolicy.EXPLICIT, ack_wait=60).as_dict() | {
        "max_bytes": 1_000
    }
    await publisher.ask(f"CONSUMER.DURABLE.CREATE.{STREAM}.{CONSUMER}", {"stream_name": STREAM, "config": config})
    waits = 0
    with structlog.testing.capture_logs() as logs:
        async with connected(nats_server, "reader") as connection:
            puller = Puller(connection, STREAM, restore=nothing_to_restore)
            start = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - start < 1:
                assert await puller.wait([CONSUMER]) == []
                waits += 1
    assert waits < 5
    (said,) = [line for line in logs if line["event"] == "pull ended"]
    assert "MaxRequestMaxBytes" in said["status"]


async def test_consumer_that_vanished_is_made_again_though_another_one_is_always_busy(
    nats_server: NatsServer, publisher: JetStreamConnection
) -> None:
    """人点的那条车道的消费者没有了，事件的那一条一直有任务：工人从来不空等，也要把它建回来。"""
    restored: list[None] = []

    async def restore() -> None:
        restored.append(None)
        await ensure_consumer(connection, STREAM, ConsumerConfig(durable_name="urgent", ack_policy=AckPolicy.EXPLICIT))

    for number in range(200):
        await publisher.publish("number", b"", message_id=str(number))
    async with connected(nats_server, "reader") as connection, asyncio.timeout(30):
        puller = Puller(connection, STREAM, restore=restore)
        for _ in range(50):
            assert await puller.take("urgent") is None or restored
            assert await puller.take(CONSUMER)
            if restored:
                break
    assert restored == [None]
