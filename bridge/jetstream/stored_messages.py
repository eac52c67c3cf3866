"""流里已经存下的消息：一条一条地看、删；一段一段地读（一个临时的消费者，成批、按序、不确认，漏了一条就从漏掉的地方重新读）。"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.errors import NatsUnavailableError
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.server_errors import SEQUENCE_NOT_FOUND
from bridge.jetstream.streams import ask_about, ensure_consumer

_BATCH_SIZE = 500
_PATIENCE_SECONDS = 2.0
_FRUITLESS_ATTEMPTS = 5
_INACTIVE_SECONDS = 60.0


@dataclass(frozen=True)
class StoredMessage:
    """流里存着的一条消息。"""

    stream: str
    sequence: int
    stored_at: datetime
    subject: str
    data: bytes
    key: str = ""
    """没有序号的（从没存进流里）靠它区分。"""

    @classmethod
    def of(cls, message: Msg) -> StoredMessage:
        origin = message.metadata
        return cls(origin.stream, origin.sequence.stream, origin.timestamp, message.subject, message.data)


async def stored_message(connection: JetStreamConnection, stream: str, sequence: int) -> StoredMessage | None:
    """流里的这一条；已经不在了就是 None。"""
    return await _message(connection, stream, {"seq": sequence})


async def last_message(connection: JetStreamConnection, stream: str, subject: str) -> StoredMessage | None:
    """这个主题最新的一条；没有就是 None。"""
    return await _message(connection, stream, {"last_by_subj": subject})


async def first_message(
    connection: JetStreamConnection, stream: str, subject: str, *, after: int
) -> StoredMessage | None:
    """这个主题在 after 之后的第一条；没有就是 None。"""
    return await _message(connection, stream, {"seq": after + 1, "next_by_subj": subject})


async def delete_message(connection: JetStreamConnection, stream: str, sequence: int) -> None:
    """从流里删去一条；已经不在了也算删了。"""
    with connection.managing(stream):
        try:
            await connection.ask(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
        except nats.js.errors.APIError as error:
            if error.err_code != SEQUENCE_NOT_FOUND:
                raise


async def delete_messages_before(connection: JetStreamConnection, stream: str, sequence: int) -> None:
    """从流里删去这个序号之前的全部；它自己留着。"""
    with connection.managing(stream):
        await connection.ask(f"STREAM.PURGE.{stream}", {"seq": sequence})


async def _message(connection: JetStreamConnection, stream: str, which: Mapping[str, Any]) -> StoredMessage | None:
    answer = await ask_about(connection, stream, f"STREAM.MSG.GET.{stream}", which)
    if answer is None:
        return None
    found = answer["message"]
    stored_at = datetime.fromisoformat(found["time"])
    return StoredMessage(stream, found["seq"], stored_at, found["subject"], base64.b64decode(found.get("data") or ""))


@dataclass(frozen=True)
class Stretch:
    """流里的一段：从 first（序号，或存下的时刻）到序号 last，两端都含。"""

    first: int | datetime
    last: int


async def read_stored(
    connection: JetStreamConnection,
    stream: str,
    stretch: Stretch,
    *,
    subjects: Sequence[str] = (),
    headers_only: bool = False,
) -> AsyncGenerator[list[Msg], None]:
    """一批一批地给出这一段里的消息，按存下的次序；内存里只有一批。

    :param subjects: 只要这些主题的；不给就是全部。
    :raises NatsUnavailableError: 试了几次都没有新的消息来。
    """
    first = stretch.first
    fruitless = 0
    while not isinstance(first, int) or first <= stretch.last:
        fruitless += 1
        if fruitless > _FRUITLESS_ATTEMPTS:
            raise NatsUnavailableError(
                f"stream {stream} does not hand out its messages from {first} on: look into the log of NATS"
            )
        async with _reading(connection, stream, first, subjects, headers_only) as (subscription, expected):
            left = expected
            async for messages in _in_order(subscription, expected):
                left = messages[-1].metadata.num_pending
                wanted = [message for message in messages if message.metadata.sequence.stream <= stretch.last]
                if wanted:
                    fruitless = 0
                    first = wanted[-1].metadata.sequence.stream + 1
                    yield wanted
                if len(wanted) < len(messages):
                    return
            if not left:
                return


async def _in_order(subscription: JetStreamContext.PullSubscription, pending: int) -> AsyncIterator[list[Msg]]:
    """一个消费者交出来的消息；缺了一条、断了、没有下文，就到此为止。"""
    expected = 1
    while pending:
        try:
            fetched = await subscription.fetch(min(_BATCH_SIZE, pending), _PATIENCE_SECONDS)
        except (nats.errors.Error, TimeoutError):
            return
        # 不确认的消息服务器不会再投：序号不连着的，从缺口起都不要
        in_order = [
            message for place, message in enumerate(fetched, expected) if message.metadata.sequence.consumer == place
        ]
        if in_order:
            expected += len(in_order)
            pending = in_order[-1].metadata.num_pending
            yield in_order
        if len(in_order) < len(fetched):
            return


@contextlib.asynccontextmanager
async def _reading(
    connection: JetStreamConnection, stream: str, first: int | datetime, subjects: Sequence[str], headers_only: bool
) -> AsyncIterator[tuple[JetStreamContext.PullSubscription, int]]:
    """临时的消费者，与它有多少要交出来。"""
    by_sequence = isinstance(first, int)
    config = ConsumerConfig(
        # 自己起名：没等到答复会再问一次，没有名字就建了两个
        name=connection.client.new_inbox().rpartition(".")[2],
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE if by_sequence else DeliverPolicy.BY_START_TIME,
        opt_start_seq=max(first, 1) if isinstance(first, int) else None,
        opt_start_time=None if isinstance(first, int) else first,
        ack_policy=AckPolicy.NONE,
        filter_subjects=sorted(subjects) or None,
        headers_only=headers_only or None,
        inactive_threshold=_INACTIVE_SECONDS,
        mem_storage=True,
        num_replicas=1,
    )
    # 没人用了服务器自己删掉它：读到一半死去，不会留下消费者
    info = await ensure_consumer(connection, stream, config)
    subscription = await connection.context.pull_subscribe_bind(stream=stream, name=info.name)
    try:
        yield subscription, info.num_pending or 0
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()
            await connection.context.delete_consumer(stream, info.name)
