"""导入点名的订单与它们的版本；散在许多天的订单号多半是占位的（`-`、`合计`、`N/A`），说出来。

点到这样一个号的每次导入，都影响它到过的每一天（DOMAIN 第 2 节），少要求一天也不行；要省的只能是文件里的那一行。
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.business_day import DayRange, local_day, partition_range
from etl_assets.core.etl_tables import troubles
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, trimmed
from etl_assets.ledger.troubles import INTAKE, RECENT, note_trouble, of_imports
from etl_assets.services.raw_rows import IN_SCOPE

logger = get_logger(__name__)

MANY_DAYS = 30
"""一个订单几天之内换日子是有的；散在这么多天的不是一个订单。"""
SCATTERED_REMEDY = (
    "each import that names it makes all these days again; if it stands for a missing id or a total, leave such rows out of the files, "
    "or leave their order id empty"
)
_NOTED = 3
_SHOWN_CHARACTERS = 100
_ONE_NOTES = sa.func.hashtextextended("etl scattered orders", 0, type_=sa.BigInteger())


def named_orders(import_ids: sa.ColumnElement[Any]) -> sa.CTE:
    """这些导入点名的订单：import_id、order_id、shop。没有订单号、没有店名的行不点任何订单的名。"""
    row = raw_orders.alias("named_row")
    order_id, shop = order_id_key(row.c.order_id), trimmed(row.c.shop)
    return (
        sa.select(row.c.import_id, order_id.label("order_id"), shop.label("shop"))
        .where(row.c.import_id == sa.any_(import_ids), order_id != "", shop != "")
        .distinct()
        .cte("named")
    )


def versions_of(orders: sa.FromClause, *columns: sa.ColumnElement[Any]) -> sa.Subquery:
    """这些订单（order_id、shop）的版本，在任何导入里：columns、version_import_id、ordered_at。

    OFFSET 0：先连接，再筛。筛的条件规划器估不准（没有统计时以为只剩一行），会选嵌套循环，几千行就要几秒。
    """
    version = raw_orders.alias("version")
    same_order = sa.and_(
        order_id_key(version.c.order_id) == orders.c.order_id, trimmed(version.c.shop) == orders.c.shop
    )
    return (
        sa.select(*columns, version.c.import_id.label("version_import_id"), version.c.ordered_at)
        .select_from(orders)
        .join(version, same_order)
        .offset(0)
        .subquery("versions")
    )


def note_scattered_orders(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> None:
    """这次导入点名的订单里，散得最开的几个；找它们要再读一遍版本，所以一小时至多一回，别人正找着也不找。"""
    recently = sa.select(troubles.c.task).where(of_imports(settings.target_schema, within=RECENT)).exists()
    may_look = sa.case((recently, sa.false()), else_=sa.func.pg_try_advisory_xact_lock(_ONE_NOTES))
    if not connection.scalar(sa.select(may_look)):
        return
    statement = _scattered(settings.timezone, partition_range(settings))
    for row in connection.execute(statement, {"import_ids": [import_id]}):
        order_id, shop = (repr(text[:_SHOWN_CHARACTERS]) for text in (row.order_id, row.shop))
        others = f" ({row.ids - 1:,} more such ids in import {import_id})" if row.ids > 1 else ""
        message = f"order id {order_id} of shop {shop} is in {row.imports:,} imports, over {row.days:,} days{others}"
        logger.warning("an order id is on so many days that it is no order", said=message, import_id=str(import_id))
        note_trouble(
            connection, process=INTAKE, task=f"{settings.target_schema}: {order_id} of {shop}", message=message
        )


@lru_cache(maxsize=8)
def _scattered(timezone: str, partitions: DayRange) -> sa.Select[Any]:
    named = named_orders(array("import_ids", sa.Uuid))
    versions = versions_of(named, named.c.order_id, named.c.shop)
    dated = (
        sa.select(versions, local_day(versions.c.ordered_at, timezone).label("day"))
        .join(import_tasks, import_tasks.c.import_id == versions.c.version_import_id)
        .where(IN_SCOPE)
        .subquery("dated")
    )
    days, imports = sa.func.count(dated.c.day.distinct()), sa.func.count(dated.c.version_import_id.distinct())
    return (
        sa.select(
            dated.c.shop,
            dated.c.order_id,
            imports.label("imports"),
            days.label("days"),
            sa.func.count().over().label("ids"),
        )
        .where(partitions.includes(dated.c.day))
        .group_by(dated.c.shop, dated.c.order_id)
        .having(days > MANY_DAYS)
        .order_by(days.desc(), imports.desc(), dated.c.shop, dated.c.order_id)
        .limit(_NOTED)
    )
