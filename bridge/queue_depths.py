"""NATS 一侧的现状：每条车道等着与在做的任务、没处理的事件、死信的个数。"""

from __future__ import annotations

from typing import Any

from nats.js.errors import NotFoundError

from bridge.broker import TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.events.subjects import EVENTS_DLQ_STREAM, EVENTS_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.listener import CONSUMER
from bridge.settings import LANES, BridgeSettings


async def read_queue_depths(settings: BridgeSettings) -> list[dict[str, Any]]:
    """一行一个队列：waiting 等着的，in_progress 已取走未确认的；死信只有 waiting。"""
    connection = JetStreamConnection(settings, name="status")
    await connection.open()
    try:
        own = settings.own_name
        consumers = [(EVENTS_STREAM, own(CONSUMER)), *((own(TASKS_STREAM), lane) for lane in LANES)]
        depths = [await _consumer_depth(connection, stream, consumer) for stream, consumer in consumers]
        return depths + [await _stream_depth(connection, stream) for stream in (EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM))]
    finally:
        await connection.close()


async def _consumer_depth(connection: JetStreamConnection, stream: str, consumer: str) -> dict[str, Any]:
    try:
        info = await connection.context.consumer_info(stream, consumer)
    except NotFoundError:
        return {"queue": f"{stream}.{consumer}", "waiting": None, "in_progress": None}
    return {"queue": f"{stream}.{consumer}", "waiting": info.num_pending, "in_progress": info.num_ack_pending}


async def _stream_depth(connection: JetStreamConnection, stream: str) -> dict[str, Any]:
    try:
        info = await connection.context.stream_info(stream)
    except NotFoundError:
        return {"queue": stream, "waiting": None, "in_progress": None}
    return {"queue": stream, "waiting": info.state.messages, "in_progress": None}
