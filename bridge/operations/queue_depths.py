"""NATS 一侧的现状：每条车道等着与在做的任务、没处理的事件、死信的个数。"""

from __future__ import annotations

from typing import Any

from bridge.events.streams import CONSUMER, consumer_names
from bridge.events.subjects import EVENTS_DLQ_STREAM, EVENTS_STREAM
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import consumer_info, stream_use
from bridge.queue.streams import TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.settings import LANES, BridgeSettings


async def read_queue_depths(settings: BridgeSettings) -> list[dict[str, Any]]:
    """一行一个队列：waiting 等着的，in_progress 已取走未确认的；死信只有 waiting，与占了上限的百分之几 full。"""
    async with JetStreamConnection(settings, name="status") as connection:
        own = settings.own_name
        listened = await consumer_names(settings, connection) or [own(CONSUMER)]
        consumers = [*((EVENTS_STREAM, name) for name in listened), *((own(TASKS_STREAM), lane) for lane in LANES)]
        depths = [await _consumer_depth(connection, stream, consumer) for stream, consumer in consumers]
        return depths + [await _stream_depth(connection, stream) for stream in (EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM))]


async def _consumer_depth(connection: JetStreamConnection, stream: str, consumer: str) -> dict[str, Any]:
    info = await consumer_info(connection, stream, consumer)
    waiting, in_progress = (info.num_pending, info.num_ack_pending) if info else (None, None)
    return {"queue": f"{stream}.{consumer}", "waiting": waiting, "in_progress": in_progress, "full": None}


async def _stream_depth(connection: JetStreamConnection, stream: str) -> dict[str, Any]:
    use = await stream_use(connection, stream)
    waiting, full = (use.messages, round(use.share * 100)) if use else (None, None)
    return {"queue": stream, "waiting": waiting, "in_progress": None, "full": full}
