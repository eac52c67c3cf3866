"""监听器把流里的事件处理到了哪里。"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from bridge.events.subjects import DATA_IMPORT_COMPLETED, EVENTS_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.listener import consumer_name
from bridge.settings import BridgeSettings

_LONG_AGO = datetime.fromtimestamp(0, UTC)


async def handled_up_to(connection: JetStreamConnection, settings: BridgeSettings, subject: str) -> int:
    """这个主题到此为止（含）的事件监听器都处理了；从没监听过就是 0。

    处理了的：要求已经提交，或者记下在等导入，或者进了死信。
    """
    state = await connection.stream_state(EVENTS_STREAM)
    consumer = await connection.consumer_info(EVENTS_STREAM, consumer_name(settings, subject))
    if state is None or consumer is None:
        return 0
    if not consumer.num_pending and not consumer.num_ack_pending:
        return state.last_seq
    return (consumer.ack_floor and consumer.ack_floor.stream_seq) or 0


async def backlog_begins_at(connection: JetStreamConnection, settings: BridgeSettings) -> datetime | None:
    """还有导入事件没处理时，已处理的最后一个是何时存下的；没有积压是 None。"""
    newest = await _newest(connection)
    handled = await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED)
    if handled >= newest:
        return None
    return (handled and await connection.stored_at(EVENTS_STREAM, handled)) or _LONG_AGO


async def newest_import_event(settings: BridgeSettings) -> int:
    """流里最新的导入事件的序号；没有就是 0。"""
    async with _connected(settings) as connection:
        return await _newest(connection)


async def has_handled(settings: BridgeSettings, *, sequence: int) -> bool:
    """这个序号与更早的导入事件，监听器都处理了。"""
    async with _connected(settings) as connection:
        return await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED) >= sequence


async def _newest(connection: JetStreamConnection) -> int:
    newest = await connection.last_message(EVENTS_STREAM, DATA_IMPORT_COMPLETED)
    return newest.sequence if newest else 0


@asynccontextmanager
async def _connected(settings: BridgeSettings) -> AsyncIterator[JetStreamConnection]:
    connection = JetStreamConnection(settings, name="wait")
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()
