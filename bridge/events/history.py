"""从 EVENTS 流里读回已发布的完成事件。"""

from __future__ import annotations

import json
from typing import Any

from bridge.events.subjects import ETL_COMPLETED, EVENTS_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stored_messages import Stretch, read_stored


async def read_completions(settings: BridgeSettings) -> list[tuple[str, dict[str, Any]]]:
    """流里全部的完成事件，按存下的次序：（资产，事件内容）。"""
    assets = {subject: asset for asset, subject in ETL_COMPLETED.items()}
    connection = JetStreamConnection(settings, name="history")
    await connection.open()
    try:
        state = await connection.stream_state(EVENTS_STREAM)
        everything = Stretch(1, state.last_seq if state else 0)
        return [
            (assets[message.subject], json.loads(message.data))
            async for messages in read_stored(connection, EVENTS_STREAM, everything, subjects=list(assets))
            for message in messages
        ]
    finally:
        await connection.close()
