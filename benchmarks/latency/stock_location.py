"""原样的 Dagster 听同一个流的做法：一个传感器，自己的持久消费者，一个事件要一个运行；资产是同样的三个。

它写自己的 schema（ETL_TARGET_SCHEMA），听自己的主题，所以两边不做彼此的事件。执行器用进程内的，比缺省的多进程快。
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import date
from uuid import UUID

import nats
import nats.errors
import sqlalchemy as sa
from dagster import (
    DefaultSensorStatus,
    Definitions,
    ResourceParam,
    RunRequest,
    define_asset_job,
    in_process_executor,
    sensor,
)
from nats.aio.msg import Msg

from bridge.nats_names import EVENTS_PREFIX, EVENTS_STREAM
from bridge.settings import get_bridge_settings
from etl_assets.core.business_day import local_day
from etl_assets.core.tables import raw_orders
from etl_assets.customers.asset import customers
from etl_assets.leads.asset import leads
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.orchestration.table_metadata import SOURCES
from etl_assets.orders.asset import orders

STOCK_SUBJECT = f"{EVENTS_PREFIX}stock.data_import.completed"
_CONSUMER = "stock-dagster"
_BATCH_SIZE = 100
_PATIENCE_SECONDS = 0.5

etl_job = define_asset_job("etl", selection=["orders", "customers", "leads"])


@sensor(job=etl_job, minimum_interval_seconds=1, default_status=DefaultSensorStatus.RUNNING)
def imports_completed(database: ResourceParam[EtlDatabase]) -> Iterator[RunRequest]:
    for event_id, import_id in asyncio.run(_pull()):
        for day in _days_of(database, import_id):
            yield RunRequest(run_key=f"{event_id} {day}", partition_key=day.isoformat())


async def _pull() -> list[tuple[str, UUID]]:
    client = await nats.connect(get_bridge_settings().nats_servers)
    try:
        subscription = await client.jetstream().pull_subscribe(STOCK_SUBJECT, durable=_CONSUMER, stream=EVENTS_STREAM)
        messages: list[Msg] = []
        try:
            messages = await subscription.fetch(_BATCH_SIZE, timeout=_PATIENCE_SECONDS)
        except nats.errors.TimeoutError:
            return []
        events = [json.loads(message.data) for message in messages]
        for message in messages:
            await message.ack_sync()
        return [(event["event_id"], UUID(event["import_id"])) for event in events]
    finally:
        await client.close()


def _days_of(database: EtlDatabase, import_id: UUID) -> list[date]:
    day = local_day(raw_orders.c.ordered_at, database.settings.timezone)
    with database.engine.connect() as connection:
        return list(connection.scalars(sa.select(day.distinct()).where(raw_orders.c.import_id == import_id)))


defs = Definitions(
    assets=[*SOURCES, orders, customers, leads],
    jobs=[etl_job],
    sensors=[imports_completed],
    resources={"database": EtlDatabase()},
    executor=in_process_executor,
)
