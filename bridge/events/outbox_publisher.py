"""把发件箱里的完成事件发布到 NATS：存下了才从发件箱删去；一个发不了的放在一边，不挡后面的。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from bridge.errors import PayloadTooLargeError, StreamConflictError
from bridge.events.subjects import etl_completed
from bridge.jetstream.connection import JetStreamConnection
from etl_assets.core.database_sync import transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.ledger.outbox import delete_published, read_unpublished, set_aside

logger = get_logger(__name__)

_BATCH_SIZE = 200

_set_aside = RepeatedWarning(logger, "a completion event cannot be published, it is set aside and tried again later")


async def publish_outbox(engine: sa.Engine, connection: JetStreamConnection) -> int:
    """发完为止，按写下的次序；返回发布的个数。NATS 不在、流满了就到此为止，剩下的留在发件箱里，再发一次不会重复。"""
    published = 0
    while events := await asyncio.to_thread(transact, engine, read_unpublished, limit=_BATCH_SIZE):
        stored: list[int] = []
        problems: dict[int, str] = {}
        try:
            for event in events:
                if problem := await _publish(connection, event):
                    problems[event.outbox_id] = problem
                    _set_aside.say(event.asset, asset=event.asset, event_id=str(event.event_id), problem=problem)
                else:
                    stored.append(event.outbox_id)
        finally:
            # 发到一半 NATS 走了，发成的也要现在划掉：过了去重的窗口再发，就成了两份
            await asyncio.to_thread(transact, engine, _settle, stored, problems)
        published += len(stored)
    return published


async def _publish(connection: JetStreamConnection, event: sa.Row[Any]) -> str | None:
    """发布一个；它自己的缘故发不了的，返回那个缘故。"""
    try:
        data = json.dumps(event.payload, ensure_ascii=False, separators=(",", ":")).encode()
        await connection.publish(etl_completed(event.asset), data, message_id=str(event.event_id))
    except (PayloadTooLargeError, StreamConflictError) as error:
        return str(error)
    return None


def _settle(connection: sa.Connection, stored: Sequence[int], problems: Mapping[int, str]) -> None:
    if stored:
        delete_published(connection, stored)
    if problems:
        set_aside(connection, problems)
