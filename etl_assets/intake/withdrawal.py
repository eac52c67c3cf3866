"""撤回一次导入：改它的状态，看它在结果表里占着什么；日子由随后的事件要求。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, shop_configs, target_tables, trimmed
from etl_assets.intake.imports import has_traces, read_affected_days
from etl_assets.reports.progress import import_progress
from etl_assets.services.order_index import same_order


@dataclass(frozen=True)
class ImportTraces:
    """一次导入在结果表里的痕迹。

    :param days: 撤回它要重做的日子。
    :param named_orders: 它点了名、此刻在 orders 里的订单数。
    :param own_orders: 其中正用着它的版本的。
    :param is_gone: 已经撤回，而且什么也没有留下。
    """

    days: Sequence[date]
    named_orders: int
    own_orders: int
    is_gone: bool


def read_traces(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> ImportTraces:
    """:raises PermanentError: 没有这次导入。"""
    status = connection.execute(
        sa.select(import_tasks.c.status).where(import_tasks.c.import_id == import_id)
    ).one_or_none()
    if status is None:
        raise PermanentError(f"there is no import {import_id}: `etl imports` lists them")
    named, own = count_orders(connection, settings, import_id)
    progress = import_progress(connection, settings, import_id)
    return ImportTraces(
        days=sorted({row.day for row in read_affected_days(connection, settings, [import_id])}),
        named_orders=named,
        own_orders=own,
        is_gone=status[0] == "failed"
        and progress.done == progress.days
        and not has_traces(connection, settings, import_id),
    )


def count_orders(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> tuple[int, int]:
    """它点了名、在 orders 里的订单，与其中用着它的版本的。"""
    orders = target_tables(settings.target_schema).orders
    named = (
        sa.select(shop_configs.c.shop_id, order_id_key(raw_orders.c.order_id).label("order_id"))
        .select_from(raw_orders)
        .join(shop_configs, shop_configs.c.shop_name == trimmed(raw_orders.c.shop))
        .where(raw_orders.c.import_id == import_id)
        .distinct()
        .subquery("named")
    )
    counts = (
        sa.select(sa.func.count(), sa.func.count().filter(orders.c.import_id == import_id))
        .select_from(named)
        .join(orders, same_order(orders, named))
    )
    return connection.execute(counts).tuples().one()


def mark_withdrawn(connection: sa.Connection, import_id: UUID) -> None:
    """已经撤回的不再动它。"""
    withdrawn = sa.and_(import_tasks.c.import_id == import_id, import_tasks.c.status.is_distinct_from("failed"))
    connection.execute(sa.update(import_tasks).where(withdrawn).values(status="failed"))


def concerns_ledger(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> bool:
    """撤回之后问：监听器会不会因它要求日子；从未入表的它不理。"""
    return import_progress(connection, settings, import_id).handled or has_traces(connection, settings, import_id)


def database_time(connection: sa.Connection) -> datetime:
    """数据库的钟：与台账记下的时刻比较。"""
    now: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return now
