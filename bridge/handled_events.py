"""监听器把流里的事件处理到了哪里。"""

from __future__ import annotations

from datetime import datetime

from bridge.events.subjects import DATA_IMPORT_COMPLETED, EVENTS_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.listener import consumer_name
from bridge.settings import BridgeSettings


async def handled_up_to(connection: JetStreamConnection, settings: BridgeSettings, subject: str) -> int:
    """这个主题到此为止（含）的事件监听器都处理了；从没监听过就是 0。

    处理了的：要求已经提交，或者记下在等导入，或者进了死信。一个主题一个消费者，所以数的只有它的。
    都投递过、剩下没确认的又都是第二次以上的，也算：它们判过一回而做不成（死信流满了，数据库不让它做），
    等到哪一天说不准，拖不住别的。例外只有一刻：监听器死在一批当中，那一批重投了，还没有判完。
    """
    state = await connection.stream_state(EVENTS_STREAM)
    consumer = await connection.consumer_info(EVENTS_STREAM, consumer_name(settings, subject))
    if state is None or consumer is None:
        return 0
    if not consumer.num_pending and (consumer.num_ack_pending or 0) <= (consumer.num_redelivered or 0):
        # 问过流之后才存下、才处理的不算在内
        return state.last_seq
    return (consumer.ack_floor and consumer.ack_floor.stream_seq) or 0


async def backlog_begins_at(connection: JetStreamConnection, settings: BridgeSettings) -> datetime | None:
    """还有导入事件没处理时，其中第一个是何时存下的；没有积压是 None。"""
    handled = await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED)
    first = await connection.first_message(EVENTS_STREAM, DATA_IMPORT_COMPLETED, after=handled)
    return None if first is None else first.stored_at


async def newest_import_event(connection: JetStreamConnection) -> int:
    """流里最新的导入事件的序号；没有就是 0。"""
    newest = await connection.last_message(EVENTS_STREAM, DATA_IMPORT_COMPLETED)
    return newest.sequence if newest else 0
