"""一个商机的订单，一个订单的商机。"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import polars as pl
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
    wanted, customers = tables.leads.alias("wanted"), tables.customers
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
    counted = _read_counted(connection, settings, lead.customer_key)
    return counted.slice(lead.orders_before, lead.orders).to_dicts()


def find_lead_no(
    connection: sa.Connection, settings: EtlSettings, customer_key: str, shop_id: UUID, order_id: str
) -> int | None:
    """客户的这个订单归几号商机；不计数的（取消了）、商机还没有算到它的是 None。"""
    counted = _read_counted(connection, settings, customer_key).with_row_index("position")
    own = counted.filter((pl.col("shop_id") == str(shop_id)) & (pl.col("order_id") == order_id))
    if own.is_empty():
        return None
    leads, customers = (target_tables(settings.target_schema).of_asset[name] for name in ("leads", "customers"))
    upto = sa.func.sum(_order_count(leads)).over(order_by=leads.c.lead_no).label("upto")
    numbered = (
        sa.select(leads.c.lead_no, upto)
        .join(customers, customers.c.customer_global_id == leads.c.customer_global_id)
        .where(customers.c.customer_key == customer_key, leads.c.lead_no.is_not(None))
        .subquery("numbered")
    )
    first = sa.select(sa.func.min(numbered.c.lead_no)).where(numbered.c.upto > own["position"].item())
    lead_no: int | None = connection.scalar(first)
    return lead_no


def _read_counted(connection: sa.Connection, settings: EtlSettings, customer_key: str) -> pl.DataFrame:
    """客户计数的订单，按先后排好。"""
    orders = target_tables(settings.target_schema).orders
    theirs = (
        sa.select(orders)
        .join(order_index, same_order(orders))
        .where(order_index.c.target == settings.target_schema, of_customer(sa.literal(customer_key)))
    )
    frame = read_frame(connection, theirs)
    is_cancelled = has_status(status_spellings(frame["latest_status"]), settings.cancelled_statuses)
    return frame.filter(~is_cancelled).sort("ordered_at", "order_id")


def _order_count(leads: sa.FromClause) -> sa.ColumnElement[int]:
    first, *others = (sa.func.coalesce(leads.c[name], 0) for name in COUNTS)
    return sum(others, start=first)
