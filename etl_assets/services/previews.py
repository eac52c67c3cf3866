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


PREVIEWED = frozenset(_SHOWN)


@dataclass(frozen=True)
class Preview:
    """rows 是样例，一行一个列名 → 值；counts 是名字 → 笔数。"""

    rows: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)


def read_preview(engine: sa.Engine, settings: EtlSettings, asset: str, day: date) -> Preview:
    """这一天的订单，或这一天有订单的客户与他们的商机。"""
    sample, counted = _statements(settings.target_schema, asset)
    with translated_errors(), engine.connect() as connection:
        rows = connection.execute(sample, {"of_day": day}).mappings().all()
        counts = {} if counted is None else dict(connection.execute(counted, {"of_day": day}).tuples().all())
    return Preview(rows=[dict(row) for row in rows], counts={str(name): count for name, count in counts.items()})


@lru_cache(maxsize=16)
def _statements(schema: str, asset: str) -> tuple[sa.Select[Any], sa.Select[Any] | None]:
    tables = target_tables(schema)
    table, condition, label = {
        "orders": (tables.orders, tables.orders.c.order_date == _DAY, tables.orders.c.system_order_type),
        "customers": (tables.customers, tables.customers.c.customer_key.in_(_customers_of_day(tables)), None),
        "leads": (tables.leads, tables.leads.c.customer_global_id.in_(_ids_of_day(tables)), tables.leads.c.current_stage),
    }[asset]
    sample = sa.select(*table.c[*_SHOWN[asset]]).where(condition).order_by(*table.primary_key).limit(SAMPLE_ROWS)
    return sample, None if label is None else sa.select(label, sa.func.count()).where(condition).group_by(label)


def _customers_of_day(tables: TargetTables) -> sa.Select[tuple[str]]:
    same_order = sa.and_(order_index.c.shop_id == tables.orders.c.shop_id, order_index.c.order_id == tables.orders.c.order_id)
    keys = sa.select(order_index.c.customer_key).join(tables.orders, same_order)
    return keys.where(order_index.c.target == tables.schema, tables.orders.c.order_date == _DAY)


def _ids_of_day(tables: TargetTables) -> sa.Select[Any]:
    return sa.select(tables.customers.c.customer_global_id).where(tables.customers.c.customer_key.in_(_customers_of_day(tables)))
