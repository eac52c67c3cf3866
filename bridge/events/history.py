"""从 EVENTS 流里读回已发布的完成事件。"""

from __future__ import annotations

import json
from typing import Any

import nats.errors
from nats.js.api import ConsumerConfig, DeliverPolicy

from bridge.events.subjects import ETL_COMPLETED, EVENTS_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.settings import BridgeSettings

_BATCH_SIZE = 500
_PATIENCE_SECONDS = 1.0


async def read_completions(settings: BridgeSettings) -> list[tuple[str, dict[str, Any]]]:
    """流里全部的完成事件，按存下的次序：（资产，事件内容）。"""
    assets = {subject: asset for asset, subject in ETL_COMPLETED.items()}
    connection = JetStreamConnection(settings, name="history")
    await connection.open()
    try:
        consumer = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, filter_subjects=sorted(assets))
        subscription = await connection.context.pull_subscribe("", stream=EVENTS_STREAM, config=consumer)
        found: list[tuple[str, dict[str, Any]]] = []
        while (info := await subscription.consumer_info()).num_pending:
            try:
                messages = await subscription.fetch(min(_BATCH_SIZE, info.num_pending), timeout=_PATIENCE_SECONDS)
            except nats.errors.TimeoutError:
                continue
            found += [(assets[message.subject], json.loads(message.data)) for message in messages]
        return found
    finally:
        await connection.close()
