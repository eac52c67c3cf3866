"""对账者：门铃可能丢，进程可能死，事件可能比导入早、可能没来；按时看一眼，有事没人做就敲门、补发、补要。"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import sqlalchemy as sa

from bridge.broker import SafeJetStreamBroker
from bridge.outbox_publisher import publish_outbox
from bridge.task_names import MATERIALIZE_DUE
from bridge.unannounced_imports import UnannouncedImports
from bridge.waiting_events import WaitingEvents
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import EtlError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.services.leases import has_claimable_days

logger = get_logger(__name__)

INTERVAL_SECONDS = 5.0
WAITING_SECONDS = 1.0
UNANNOUNCED_SECONDS = 10.0

_cannot_reconcile = RepeatedWarning(logger, "cannot reconcile now")


async def reconcile(stop: asyncio.Event, *, broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings) -> None:
    """每隔几秒对一次账，直到 stop；数据库或 NATS 不在就等下一次。"""

    async def look_after_ledger() -> None:
        if await asyncio.to_thread(_has_claimable_days, engine, settings):
            await broker.ring(MATERIALIZE_DUE, "event")
        await publish_outbox(engine, broker.connection)

    waiting = WaitingEvents(broker=broker, engine=engine, settings=settings)
    unannounced = UnannouncedImports(broker=broker, engine=engine, settings=settings)
    async with asyncio.TaskGroup() as looks:
        looks.create_task(_repeat(stop, look_after_ledger, INTERVAL_SECONDS))
        looks.create_task(_repeat(stop, waiting.look, WAITING_SECONDS))
        looks.create_task(_repeat(stop, unannounced.look, UNANNOUNCED_SECONDS))


async def _repeat(stop: asyncio.Event, look: Callable[[], Awaitable[None]], interval_seconds: float) -> None:
    while not stop.is_set():
        try:
            await look()
        except EtlError as error:
            _cannot_reconcile.say(type(error).__name__, error=str(error))
        try:
            await asyncio.wait_for(stop.wait(), interval_seconds)
        except TimeoutError:
            continue


def _has_claimable_days(engine: sa.Engine, settings: EtlSettings) -> bool:
    with translated_errors(), engine.connect() as connection:
        return has_claimable_days(connection, settings.target_schema)
