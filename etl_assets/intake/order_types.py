"""平台的订单类型各算哪一种：读、改 order_type_mappings。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import order_type_mappings, target_tables


def read_order_types(connection: sa.Connection) -> dict[str, str | None]:
    """平台的类型 → 系统的类型。"""
    mappings = order_type_mappings.c
    rows = connection.execute(
        sa.select(mappings.raw_order_type, mappings.system_order_type).order_by(mappings.raw_order_type.collate("C"))
    )
    return {row[0]: row[1] for row in rows}


def set_order_types(connection: sa.Connection, types: Mapping[str, str]) -> None:
    """加上，或者改掉。"""
    rows = [{"raw_order_type": raw, "system_order_type": system} for raw, system in types.items()]
    statement = insert(order_type_mappings).values(rows)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["raw_order_type"], set_={"system_order_type": statement.excluded.system_order_type}
        )
    )


def remove_order_types(connection: sa.Connection, types: Sequence[str]) -> None:
    raw_type = order_type_mappings.c.raw_order_type
    connection.execute(sa.delete(order_type_mappings).where(raw_type == sa.any_(sa.literal(types, sa.ARRAY(sa.Text)))))


def first_and_last_day(connection: sa.Connection, settings: EtlSettings) -> tuple[date, date] | None:
    """订单从哪天到哪天。"""
    day = target_tables(settings.target_schema).orders.c.order_date
    first, last = connection.execute(sa.select(sa.func.min(day), sa.func.max(day))).one()
    return None if first is None else (first, last)
