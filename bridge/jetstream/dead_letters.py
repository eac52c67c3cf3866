"""死信：原文与它的来历存进死信流，之后才终结原消息。"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum

from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StreamConfig

from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.headers import header_bytes, header_text
from bridge.jetstream.stored_messages import StoredMessage
from bridge.jetstream.streams import store
from etl_assets.core import metrics

GARBAGE_HEAD_BYTES = 4_096
"""不是事件也不是任务的，死信里只留这么多：一千条 1 MB 的垃圾挤不满死信流。"""

LETTERS_FULL_REMEDY = "look with `etl dlq list`; retry or drop some, or raise its max_bytes with `nats stream edit`"


class DeadLetterHeader(StrEnum):
    """死信的消息头：为什么、从哪里来。"""

    REASON = "Etl-Reason"
    SUBJECT = "Etl-Subject"
    STREAM = "Etl-Stream"
    SEQUENCE = "Etl-Sequence"
    ATTEMPTS = "Etl-Attempts"
    TASK = "Etl-Task"
    ORIGINAL_BYTES = "Etl-Original-Bytes"
    SHA256 = "Etl-Sha256"
    """这两个只在正文被截短时才有：原来多长、全文的散列。"""


def letters_stream(name: str, subjects: str) -> StreamConfig:
    """满了就拒收，要埋的留在原来的流里；不过期：人丢弃之前什么都不丢。"""
    return StreamConfig(
        name=name, subjects=[subjects], discard=DiscardPolicy.NEW, max_bytes=64 << 20, duplicate_window=600
    )


async def bury(
    connection: JetStreamConnection,
    message: Msg | StoredMessage,
    *,
    letters: StreamConfig,
    subject: str,
    reason: str,
    attempts: int,
    is_garbage: bool = False,
    labels: Mapping[str, str] | None = None,
) -> None:
    """原文存进死信流 letters（它不见了就建回来），之后才终结原消息；中途崩溃会再来一次，编号相同所以只存一份。

    :param message: 取到手的消息；流里读来的（StoredMessage）没有什么要终结。
    :param is_garbage: 重试没有用的：大的只留开头。
    :raises StreamFullError: 死信流满了；原消息没有动。
    """
    original = StoredMessage.of(message) if isinstance(message, Msg) else message
    headers = {
        DeadLetterHeader.REASON: header_text(reason),
        DeadLetterHeader.SUBJECT: original.subject,
        DeadLetterHeader.STREAM: original.stream,
        DeadLetterHeader.SEQUENCE: str(original.sequence),
        DeadLetterHeader.ATTEMPTS: str(attempts),
        **(labels or {}),
    }
    # 带上发布时刻：流重建之后序号会重来
    message_id = f"{original.stream}-{original.sequence}-{original.stored_at.timestamp():.6f}{original.key}"
    data = original.data
    # 先当它要截来算：截短了要多两个头，它们也占 max_payload 的地方
    cut = {
        **headers,
        DeadLetterHeader.ORIGINAL_BYTES: str(len(data)),
        DeadLetterHeader.SHA256: hashlib.sha256(data).hexdigest(),
    }
    room = connection.client.max_payload - header_bytes({"Nats-Msg-Id": message_id, **cut})
    if len(data) > (room := min(room, GARBAGE_HEAD_BYTES) if is_garbage else room):
        data, headers = data[:room], cut
    await store(connection, letters, subject, data, message_id=message_id, headers=headers)
    metrics.letter_stored(str(letters.name))
    if isinstance(message, Msg):
        # 存下之后才终结：反过来，死在两步之间就丢了
        await connection.confirm(message, b"+TERM dead-lettered")
