"""监听器把流里的事件处理到了哪里。"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from bridge.errors import StreamConflictError
from bridge.events.envelope import IMPORT_STATUSES, DataImportCompleted
from bridge.events.streams import consumer_name
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, first_message, last_message, read_stored
from bridge.jetstream.streams import consumer_info, stream_state
from bridge.nats_names import EVENTS_STREAM
from bridge.settings import BridgeSettings


async def handled_up_to(connection: JetStreamConnection, settings: BridgeSettings, subject: str) -> int:
    """这个主题到此为止（含）的事件监听器都处理了；从没监听过就是 0。

    处理了的：要求已经提交，或者记下在等导入，或者进了死信。
    """
    handled, _ = await _position(connection, settings, subject)
    return handled


async def backlog_begins_at(connection: JetStreamConnection, settings: BridgeSettings) -> datetime | None:
    """还有导入事件没处理时，其中第一个是何时存下的；没有积压、只剩卡住的是 None。"""
    handled, are_stuck = await _position(connection, settings, DATA_IMPORT_COMPLETED)
    first = None if are_stuck else await first_message(connection, EVENTS_STREAM, DATA_IMPORT_COMPLETED, after=handled)
    return None if first is None else first.stored_at


async def newest_unhandled(connection: JetStreamConnection, settings: BridgeSettings, import_id: UUID) -> int:
    """流里这次导入最新的、也许还没处理的事件的序号；没有是 0。

    从没确认的第一个读起：它可能卡住了，后面的早已处理。
    """
    # 先看末尾：问过之后才来的事件不归这一次等
    last = await last_message(connection, EVENTS_STREAM, DATA_IMPORT_COMPLETED)
    handled = await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED)
    if last is None or handled >= last.sequence:
        return 0
    newest = 0
    try:
        stretch = Stretch(handled + 1, last.sequence)
        async for messages in read_stored(connection, EVENTS_STREAM, stretch, subjects=[DATA_IMPORT_COMPLETED]):
            for message in messages:
                if _concerns(message.data, import_id):
                    newest = message.metadata.sequence.stream
    except StreamConflictError:  # work-queue 的流不许别人来读：哪个都可能是
        return last.sequence
    return newest


def _concerns(data: bytes, import_id: UUID) -> bool:
    try:
        event = DataImportCompleted.model_validate_json(data)
    except ValueError:
        return False
    return event.import_id == import_id and event.status in IMPORT_STATUSES


async def _position(connection: JetStreamConnection, settings: BridgeSettings, subject: str) -> tuple[int, bool]:
    """处理到了哪里，后面的是不是都卡住了。

    卡住的：都投递过，没确认的又都投递过不止一次。它们判过一回而做不成（死信流满了，数据库不让它做），哪一天了结说不准。
    一个主题一个消费者，所以数的只有它的。例外只有一刻：监听器死在一批当中，那一批重投了，还没有判完。
    """
    state = await stream_state(connection, EVENTS_STREAM)  # 先问它：问过之后才存下的不算在内
    consumer = await consumer_info(connection, EVENTS_STREAM, consumer_name(settings, subject))
    if state is None or consumer is None:
        return 0, False
    unsettled = consumer.num_ack_pending or 0
    if not consumer.num_pending and not unsettled:
        return state.last_seq, False
    floor = (consumer.ack_floor and consumer.ack_floor.stream_seq) or 0
    return floor, not consumer.num_pending and unsettled <= (consumer.num_redelivered or 0)
