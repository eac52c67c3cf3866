"""结果表的哪些行是一天的：它自己的业务日，或那一天有订单的客户。"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import TypeAlias

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.etl_tables import order_index
from etl_assets.core.tables import TargetTables
from etl_assets.services.order_index import same_order

OnDays: TypeAlias = Callable[[sa.ColumnElement[date]], sa.ColumnElement[bool]]
"""业务日的列 → 是不是要的日子。"""


def rows_on(tables: TargetTables, asset: str, on_days: OnDays) -> sa.ColumnElement[bool]:
    """SQL 条件：资产的这一行是这些天的。"""
    table, description = tables.of_asset[asset].c, descriptions()[asset]
    if not description.by_customer:
        return on_days(table[description.dated_by])
    keys = customers_with_orders(tables, on_days(tables.orders.c.order_date))
    if "customer_key" in table:
        return table.customer_key.in_(keys)
    ids = sa.select(tables.customers.c.customer_global_id).where(tables.customers.c.customer_key.in_(keys))
    return table.customer_global_id.in_(ids)


def customers_with_orders(tables: TargetTables, among: sa.ColumnElement[bool]) -> sa.Select[tuple[str]]:
    """语句：有这样的订单的客户；一个订单一行。"""
    keys = sa.select(order_index.c.customer_key).join(tables.orders, same_order(tables.orders))
    return keys.where(order_index.c.target == tables.schema, among)
