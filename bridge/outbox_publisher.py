"""把发件箱里的完成事件发布到 NATS：存下了才从发件箱删去。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from bridge.events.subjects import ETL_COMPLETED
from bridge.jetstream import JetStreamConnection
from etl_assets.core.database_errors import translated_errors
from etl_assets.services.outbox import delete_published, read_unpublished

_BATCH_SIZE = 200


async def publish_outbox(engine: sa.Engine, connection: JetStreamConnection) -> int:
    """发完为止，按写下的次序；返回发布的个数。中途失败的留在发件箱里，再发一次不会重复。"""
    published = 0
    while events := await asyncio.to_thread(_read, engine):
        for event in events:
            data = json.dumps(event.payload, ensure_ascii=False).encode()
            await connection.publish(ETL_COMPLETED[event.asset], data, message_id=str(event.event_id))
        await asyncio.to_thread(_delete, engine, [event.outbox_id for event in events])
        published += len(events)
    return published


def _read(engine: sa.Engine) -> Sequence[sa.Row[Any]]:
    with translated_errors(), engine.connect() as connection:
        return read_unpublished(connection, limit=_BATCH_SIZE)


def _delete(engine: sa.Engine, outbox_ids: list[int]) -> None:
    with translated_errors(), engine.begin() as connection:
        delete_published(connection, outbox_ids)
