"""有没有谁也没要求过、或者做完了却哪里都找不到的原始行：从备份恢复之后会有。只读；给 `etl doctor`。"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import sqlalchemy as sa

from etl_assets.core.business_day import local_day, partition_range
from etl_assets.core.etl_tables import ledger, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs, target_tables, trimmed
from etl_assets.reports.health import is_settled
from etl_assets.services.raw_rows import IN_SCOPE
from etl_assets.services.rollout import read_share


@dataclass(frozen=True)
class Disagreement:
    """原始数据里有、台账或表里没有的：行数与它们的日子（first 到 last 之间）。"""

    rows: int
    first: date
    last: date


def unasked_days(connection: sa.Connection, settings: EtlSettings) -> Disagreement | None:
    """有原始行、台账却从没被要求过的日子：台账比数据旧。"""
    rows = _raw_rows(settings)
    asked = sa.select(ledger.c.day).where(*_of_orders(settings), ledger.c.day == rows.c.day, ledger.c.requested > 0)
    return _summary(connection, sa.select(rows.c.day).where(~asked.exists()))


def rows_nowhere(connection: sa.Connection, settings: EtlSettings) -> Disagreement | None:
    """台账说做完了，而原始行既不在 orders（它的订单也没有别的版本在）、也没有被拒收：表比台账旧。只认领一部分数据时不看。"""
    if not read_share(connection, settings).is_whole:
        return None
    rows = _raw_rows(settings)
    orders = target_tables(settings.target_schema).orders
    there = (
        sa.select(orders.c.order_id)
        .join(shop_configs, shop_configs.c.shop_id == orders.c.shop_id)
        .where(shop_configs.c.shop_name == rows.c.shop, orders.c.order_id == rows.c.order_id)
    )
    refused = sa.select(rejected_rows.c.raw_id).where(
        rejected_rows.c.raw_id == rows.c.raw_id, rejected_rows.c.target == settings.target_schema
    )
    done = sa.select(ledger.c.day).where(
        *_of_orders(settings),
        ledger.c.day == rows.c.day,
        ledger.c.requested > 0,
        ledger.c.requested <= ledger.c.materialized,
    )
    return _summary(connection, sa.select(rows.c.day).where(done.exists(), ~there.exists(), ~refused.exists()))


def _raw_rows(settings: EtlSettings) -> sa.Subquery:
    """范围之内、分区之内的原始行：raw_id、shop、order_id、day。"""
    day = local_day(raw_orders.c.ordered_at, settings.timezone).label("day")
    rows = (
        sa.select(
            raw_orders.c.raw_id,
            trimmed(raw_orders.c.shop).label("shop"),
            trimmed(raw_orders.c.order_id).label("order_id"),
            day,
        )
        .join(import_tasks, import_tasks.c.import_id == raw_orders.c.import_id)
        .where(IN_SCOPE, is_settled(settings))
        .subquery("dated")
    )
    return sa.select(rows).where(partition_range(settings).includes(rows.c.day)).subquery("raw_rows")


def _of_orders(settings: EtlSettings) -> tuple[sa.ColumnElement[bool], ...]:
    return ledger.c.target == settings.target_schema, ledger.c.asset == "orders"


def _summary(connection: sa.Connection, days: sa.Select[tuple[date]]) -> Disagreement | None:
    found = days.subquery("found")
    count, first, last = connection.execute(
        sa.select(sa.func.count(), sa.func.min(found.c.day), sa.func.max(found.c.day))
    ).one()
    return Disagreement(rows=count, first=first, last=last) if count else None
