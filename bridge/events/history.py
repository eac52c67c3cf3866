"""从 EVENTS 流里读回已发布的完成事件。"""

from __future__ import annotations

import json
from typing import Any

from bridge.events.subjects import EVERY_ETL_COMPLETED, completed_asset
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, read_stored
from bridge.jetstream.streams import stream_state
from bridge.nats_names import EVENTS_STREAM
from bridge.settings import BridgeSettings


async def read_completions(settings: BridgeSettings) -> list[tuple[str, dict[str, Any]]]:
    """流里全部的完成事件，按存下的次序：（资产，事件内容）。"""
    async with JetStreamConnection(settings, name="history") as connection:
        state = await stream_state(connection, EVENTS_STREAM)
        everything = Stretch(1, state.last_seq if state else 0)
        return [
            (completed_asset(message.subject) or "", json.loads(message.data))
            async for messages in read_stored(connection, EVENTS_STREAM, everything, subjects=[EVERY_ETL_COMPLETED])
            for message in messages
        ]
