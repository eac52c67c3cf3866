"""事件的流与消费者：EVENTS 也许是应用的，只用不改；死信流是我们的；一个主题一个消费者。"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, DiscardPolicy, StreamConfig

from bridge.errors import StreamConflictError
from bridge.events.adopted_stream import MAX_ACK_PENDING, shortcomings
from bridge.events.subjects import dead_letter_subject
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import bury, letters_stream
from bridge.jetstream.stored_messages import StoredMessage
from bridge.jetstream.streams import adopt_stream, consumer_info, ensure_consumer, ensure_stream, stream_consumers
from bridge.nats_names import EVENTS_DLQ_PREFIX, EVENTS_DLQ_STREAM, EVENTS_PREFIX, EVENTS_STREAM
from bridge.settings import BridgeSettings
from etl_assets.core.errors import EtlError
from etl_assets.core.log import RepeatedWarning, get_logger

_weak = RepeatedWarning(get_logger(__name__), "the stream of events does not keep all that is promised")

CONSUMER = "etl-bridge"
"""0.1.x 的消费者，几个主题合用；现在每个主题一个，名字以它打头。"""
OLD_CONSUMER_SECONDS = 86_400.0
"""0.1.x 的监听器都走了，这么久之后服务器自己删掉它们的消费者；其间还可以退回去。"""

_ASK_SECONDS = 3.0
_DAY = 86_400
_MIB = 1 << 20
_HEADER_ROOM = 16 << 10


def events_stream(settings: BridgeSettings) -> StreamConfig:
    """没有 EVENTS 时由我们建的那一个。满了就拒收，发布的人知道；丢旧的会丢掉还没处理的。太大的进不来，占不满它。"""
    return StreamConfig(
        name=EVENTS_STREAM,
        subjects=[EVENTS_PREFIX + ">"],
        discard=DiscardPolicy.NEW,
        max_bytes=1024 * _MIB,
        # 服务器连消息头一起量：不给头留地方，刚好够大的事件就被拒
        max_msg_size=settings.event_max_bytes + _HEADER_ROOM,
        max_age=30 * _DAY,
        duplicate_window=600,
    )


DEAD_LETTERS = letters_stream(EVENTS_DLQ_STREAM, EVENTS_DLQ_PREFIX + ">")


async def bury_event(
    connection: JetStreamConnection, event: Msg | StoredMessage, *, reason: str, attempts: int, is_garbage: bool = False
) -> None:
    """`bury` 进事件的死信流。"""
    subject = dead_letter_subject(event.subject)
    await bury(
        connection,
        event,
        letters=DEAD_LETTERS,
        subject=subject,
        reason=reason,
        attempts=attempts,
        is_garbage=is_garbage,
    )


def consumer_name(settings: BridgeSettings, subject: str) -> str:
    """一个主题一个持久消费者：谁也不会拿到自己不认识的主题，谁也不会改窄别人的过滤。"""
    return f"{settings.own_name(CONSUMER)}_{subject.removeprefix(EVENTS_PREFIX).replace('.', '-')}"


async def consumer_names(settings: BridgeSettings, connection: JetStreamConnection) -> list[str]:
    """这套安装在 EVENTS 上的消费者，别的版本建的也算；还没有人监听过就是空的。"""
    prefix = f"{settings.own_name(CONSUMER)}_"
    return sorted(name for name in await stream_consumers(connection, EVENTS_STREAM) if name.startswith(prefix))


async def read_subjects(settings: BridgeSettings, stream: str) -> list[str] | None:
    """有消费者读的主题，谁的都算；没有权限问（只许发布的用户）是 None。"""
    patterns: set[str] = set()
    try:
        async with asyncio.timeout(_ASK_SECONDS), JetStreamConnection(settings, name="publish") as connection:
            for name in await stream_consumers(connection, stream):
                info = await consumer_info(connection, stream, name)
                if info is not None:
                    patterns.update(info.config.filter_subjects or [info.config.filter_subject or ">"])
    except (TimeoutError, EtlError):
        return None
    return sorted(patterns)


async def ensure_event_streams(
    connection: JetStreamConnection, settings: BridgeSettings, subjects: Sequence[str]
) -> None:
    """EVENTS、死信流、每个主题的消费者；0.1.x 的消费者过一天由服务器删掉。

    :raises StreamConflictError: 已有的 EVENTS 守不住答应的。
    """
    existing = await adopt_stream(connection, events_stream(settings), subjects)
    for found in shortcomings(existing or {}, subjects=len(subjects)):
        if found.is_refused:
            raise StreamConflictError(EVENTS_STREAM, found.problem, found.remedy)
        _weak.say(found.problem, stream=EVENTS_STREAM, problem=found.problem, remedy=found.remedy)
    await ensure_stream(connection, DEAD_LETTERS)
    # 先看旧的确认到哪里，再建新的：新的从那里接着，一个也不漏
    old = await consumer_info(connection, EVENTS_STREAM, settings.own_name(CONSUMER))
    for subject in subjects:
        await ensure_consumer(connection, EVENTS_STREAM, consumer_of(settings, subject, old))
    # 最后才给旧的定期限：它先没了，新的就不知道从哪里接起
    if old is not None and old.config.inactive_threshold != OLD_CONSUMER_SECONDS:
        await ensure_consumer(connection, EVENTS_STREAM, old.config.evolve(inactive_threshold=OLD_CONSUMER_SECONDS))


def consumer_of(settings: BridgeSettings, subject: str, old: ConsumerInfo | None) -> ConsumerConfig:
    """0.1.x 已经确认到哪里，就从哪里接着；它不认识的主题从头读起。"""
    config = ConsumerConfig(
        durable_name=consumer_name(settings, subject),
        filter_subject=subject,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=settings.event_ack_wait_seconds,
        max_deliver=-1,  # 次数由我们数：服务器的上限会让事件无声地搁浅
        max_ack_pending=MAX_ACK_PENDING,
    )
    if old is None or old.ack_floor is None or not _filters(old.config, subject):
        return config
    # 从确认的底线接，不从投到的最后一条接：投了没确认的还没有人做完
    return config.evolve(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=old.ack_floor.stream_seq + 1)


def _filters(config: ConsumerConfig, subject: str) -> bool:
    return subject == config.filter_subject or subject in (config.filter_subjects or [])
