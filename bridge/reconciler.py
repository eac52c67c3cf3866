"""对账者：门铃可能丢，进程可能死；按时看一眼台账与发件箱，有事没人做就敲门、补发。"""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from bridge.broker import SafeJetStreamBroker
from bridge.outbox_publisher import publish_outbox
from bridge.task_names import MATERIALIZE_DUE
from etl_assets.core.database_errors import say_refused, translated_errors
from etl_assets.core.errors import DatabaseRefusedError, EtlError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.services.leases import has_claimable_days

logger = get_logger(__name__)

INTERVAL_SECONDS = 5.0

_cannot_reconcile = RepeatedWarning(logger, "cannot reconcile now")


async def reconcile(stop: asyncio.Event, *, broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings) -> None:
    """每隔几秒对一次账，直到 stop；数据库或 NATS 不在就等下一次。"""
    while not stop.is_set():
        try:
            if await asyncio.to_thread(_has_claimable_days, engine, settings):
                await broker.ring(MATERIALIZE_DUE, "event")
            await publish_outbox(engine, broker.connection)
        except DatabaseRefusedError as error:
            say_refused(error)
        except EtlError as error:
            _cannot_reconcile.say(type(error).__name__, error=str(error))
        try:
            await asyncio.wait_for(stop.wait(), INTERVAL_SECONDS)
        except TimeoutError:
            continue


def _has_claimable_days(engine: sa.Engine, settings: EtlSettings) -> bool:
    with translated_errors(), engine.connect() as connection:
        return has_claimable_days(connection, settings.target_schema)
