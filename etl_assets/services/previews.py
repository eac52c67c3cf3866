"""一天的结果给人看的样子：几行样例，与按类型或阶段的笔数（网页把它们画成分区的曲线）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from etl_assets.core.database_errors import translated_errors
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, order_index, target_tables

SAMPLE_ROWS = 5

_DAY = sa.bindparam("of_day", type_=sa.Date)
_SHOWN = {
    "orders": ("order_id", "customer_nickname", "latest_status", "system_order_type", "amount", "ordered_at"),
    "customers": ("customer_nickname", "order_count", "total_amount", "first_order_at", "last_order_at"),
    "leads": ("customer_global_id", "lead_no", "current_stage", "opened_at", "last_order_at", "closed_by"),
}


_COUNTS = "counts"
PREVIEWED = frozenset(_SHOWN)


@dataclass(frozen=True)
class Preview:
    """rows 是样例，一行一个列名 → 值；counts 是名字 → 笔数。"""

    rows: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)


def read_preview(engine: sa.Engine, settings: EtlSettings, asset: str, day: date) -> Preview:
    """这一天的订单，或这一天有订单的客户与他们的商机。"""
    with translated_errors(), engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(_statement(settings.target_schema, asset), {"of_day": day}).mappings()]
    counts = [row.pop(_COUNTS) for row in rows]
    return Preview(rows=rows, counts=counts[0] or {} if counts else {})


@lru_cache(maxsize=16)
def _statement(schema: str, asset: str) -> sa.Select[Any]:
    """一条语句：样例的每一行都带着各类的笔数。"""
    tables = target_tables(schema)
    table, condition, label = {
        "orders": (tables.orders, tables.orders.c.order_date == _DAY, tables.orders.c.system_order_type),
        "customers": (tables.customers, tables.customers.c.customer_key.in_(_customers_of_day(tables)), None),
        "leads": (tables.leads, tables.leads.c.customer_global_id.in_(_ids_of_day(tables)), tables.leads.c.current_stage),
    }[asset]
    counts: sa.ColumnElement[Any] = sa.null()
    if label is not None:
        of_day = (
            sa.select(sa.func.coalesce(label, "none").label("name"), sa.func.count().label("rows"))
            .where(condition)
            .group_by(label)
            .subquery("of_day")
        )
        counts = sa.select(sa.func.json_object_agg(of_day.c.name, of_day.c.rows)).scalar_subquery()
    sample = sa.select(*table.c[*_SHOWN[asset]], counts.label(_COUNTS)).where(condition)
    return sample.order_by(*table.primary_key).limit(SAMPLE_ROWS)


def _customers_of_day(tables: TargetTables) -> sa.Select[tuple[str]]:
    same_order = sa.and_(order_index.c.shop_id == tables.orders.c.shop_id, order_index.c.order_id == tables.orders.c.order_id)
    keys = sa.select(order_index.c.customer_key).join(tables.orders, same_order)
    return keys.where(order_index.c.target == tables.schema, tables.orders.c.order_date == _DAY)


def _ids_of_day(tables: TargetTables) -> sa.Select[Any]:
    return sa.select(tables.customers.c.customer_global_id).where(tables.customers.c.customer_key.in_(_customers_of_day(tables)))
