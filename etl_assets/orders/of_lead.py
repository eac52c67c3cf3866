"""一个商机的订单。"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.errors import PermanentError
from etl_assets.core.etl_tables import order_index
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.services.figures import COUNTS, has_status, status_spellings
from etl_assets.services.order_index import of_customer, same_order
from etl_assets.services.vectorized_queries import read_frame


def read_of_lead(connection: sa.Connection, settings: EtlSettings, lead_id: UUID) -> list[dict[str, Any]]:
    """一个商机的订单，按先后排好。

    客户计数的订单依次分给 1、2… 号商机，所以它的订单就是排在前面各号的笔数之后的那一段。

    :raises PermanentError: 没有这个商机。
    """
    tables = target_tables(settings.target_schema)
    wanted, customers, orders = tables.leads.alias("wanted"), tables.customers, tables.orders
    earlier = tables.leads.alias("earlier")
    before = sa.select(sa.func.coalesce(sa.func.sum(_order_count(earlier)), 0)).where(
        earlier.c.customer_global_id == wanted.c.customer_global_id, earlier.c.lead_no < wanted.c.lead_no
    )
    count = sa.case((wanted.c.lead_no.is_not(None), _order_count(wanted)), else_=0)  # 没有编号的商机，不曾分给它订单
    lead = connection.execute(
        sa.select(customers.c.customer_key, before.scalar_subquery().label("orders_before"), count.label("orders"))
        .join_from(wanted, customers, customers.c.customer_global_id == wanted.c.customer_global_id)
        .where(wanted.c.lead_id == lead_id)
    ).one_or_none()
    if lead is None:
        raise PermanentError(f"there is no lead {lead_id}: `etl show leads` lists them with their lead_id")
    theirs = (
        sa.select(orders)
        .join(order_index, same_order(tables.orders))
        .where(order_index.c.target == settings.target_schema, of_customer(sa.literal(lead.customer_key)))
    )
    frame = read_frame(connection, theirs)
    is_cancelled = has_status(status_spellings(frame["latest_status"]), settings.cancelled_statuses)
    counted = frame.filter(~is_cancelled).sort("ordered_at", "order_id")
    return counted.slice(lead.orders_before, lead.orders).to_dicts()


def _order_count(leads: sa.FromClause) -> sa.ColumnElement[int]:
    first, *others = (sa.func.coalesce(leads.c[name], 0) for name in COUNTS)
    return sum(others, start=first)
