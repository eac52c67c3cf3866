"""一个客户、一个商机的来历：他的行，他的订单，他的商机，人写了什么。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array, unnest
from etl_assets.core.etl_tables import order_index
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import (
    closed_by_person,
    import_tasks,
    shop_configs,
    target_tables,
    trimmed,
    written_by_person,
)
from etl_assets.core.text import WHITE_SPACE
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.figures import COUNTS
from etl_assets.services.order_index import of_customer, same_order
from etl_assets.services.rollout import read_share
from etl_assets.services.shops import shops_of

Record = dict[str, Any]

SHOWN_LEADS, SHOWN_ORDERS = 20, 10
MOST_ORDERS = 10_000
"""客户的订单多于这么多，就不说哪一单归哪个商机：要读他的全部订单。"""


def keys_of(names: Iterable[tuple[UUID, str]]) -> list[str]:
    """店铺与昵称 → customer_key，一一对应。"""
    given = [(str(shop_id), name) for shop_id, name in names]
    frame = pl.DataFrame(given, schema={"shop_id": pl.String, "customer_nickname": pl.String}, orient="row")
    return frame.select(customer_key()).to_series().to_list()


def keys_outside(connection: sa.Connection, settings: EtlSettings, keys: Iterable[str]) -> set[str]:
    """其中不归我们写的（ETL_ROLLOUT）。"""
    frame = pl.DataFrame({"customer_key": list(keys)}, schema={"customer_key": pl.String})
    return set(frame.filter(~read_share(connection, settings).covers())["customer_key"])


def key_of_order(connection: sa.Connection, settings: EtlSettings, shop_id: UUID, order_id: str) -> str | None:
    """订单此刻的客户；索引里没有它是 None。"""
    index = order_index.c
    of_order = sa.and_(index.target == settings.target_schema, index.shop_id == shop_id, index.order_id == order_id)
    return connection.scalar(sa.select(index.customer_key).where(of_order))


def keys_of_name(connection: sa.Connection, settings: EtlSettings, name: str, shop: str | None) -> list[str]:
    """叫这个名字的客户在各个店（或叫 shop 的店）里会有的 customer_key，有没有这个客户另说。"""
    shops = shops_of(target_tables(settings.target_schema).orders)
    configured = sa.select(shop_configs.c.shop_id)
    if shop is not None:
        ids = connection.scalars(configured.where(shop_configs.c.shop_name == shop.strip(WHITE_SPACE)))
    else:
        ids = connection.scalars(configured.union(sa.select(shops.c.shop_id).where(shops.c.shop_id.is_not(None))))
    return keys_of((shop_id, name) for shop_id in ids)


def read_customers(connection: sa.Connection, settings: EtlSettings, keys: Iterable[str]) -> list[Record]:
    """这些客户此刻的行，带着 shop 与最近的 SHOWN_LEADS 个商机 leads（新的在前）；没有的不在。"""
    customers = target_tables(settings.target_schema).customers
    wanted = list(keys)
    statement = (
        sa.select(customers, shop_configs.c.shop_name.label("shop"))
        .outerjoin(shop_configs, shop_configs.c.shop_id == customers.c.shop_id)
        .where(customers.c.customer_key == sa.any_(array("keys", sa.Text)))
    )
    rows = [dict(row) for row in connection.execute(statement, {"keys": wanted}).mappings()]
    found = sorted(rows, key=lambda row: wanted.index(row["customer_key"]))
    leads = _read_leads(connection, settings, [row["customer_global_id"] for row in found])
    return [row | {"leads": [lead for lead in leads if _is_theirs(lead, row)]} for row in found]


def read_lead(connection: sa.Connection, settings: EtlSettings, lead_id: UUID) -> tuple[Record, Record | None] | None:
    """一个商机与它的客户；没有这个商机是 None。"""
    leads, customers = (target_tables(settings.target_schema).of_asset[name] for name in ("leads", "customers"))
    lead = connection.execute(_leads(leads).where(leads.c.lead_id == lead_id)).mappings().one_or_none()
    if lead is None:
        return None
    of_lead = customers.c.customer_global_id == lead["customer_global_id"]
    key = connection.scalar(sa.select(customers.c.customer_key).where(of_lead))
    return dict(lead), next(iter(read_customers(connection, settings, [key])), None) if key is not None else None


def read_newest_orders(connection: sa.Connection, settings: EtlSettings, key: str) -> list[Record]:
    """客户最近的 SHOWN_ORDERS 个订单，新的在前；多于 MOST_ORDERS 的，从其中任意这么多个里取。"""
    orders, index = target_tables(settings.target_schema).orders, order_index.c
    theirs = sa.select(*index["shop_id", "order_id", "order_date"]).where(
        index.target == settings.target_schema, of_customer(sa.literal(key))
    )
    some = theirs.limit(MOST_ORDERS).subquery("some")
    newest = (
        sa.select(some)
        .order_by(some.c.order_date.desc().nulls_last(), some.c.order_id.desc())
        .limit(SHOWN_ORDERS)
        .subquery("newest")
    )
    shown = ("order_id", "order_date", "latest_status", "system_order_type", "amount", "quantity", "import_id")
    statement = (
        sa.select(*orders.c[shown], import_tasks.c.source_name)
        .select_from(newest)
        .join(orders, same_order(orders, newest))
        .outerjoin(import_tasks, import_tasks.c.import_id == orders.c.import_id)
        .order_by(orders.c.order_date.desc().nulls_last(), orders.c.ordered_at.desc(), orders.c.order_id.desc())
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def _read_leads(connection: sa.Connection, settings: EtlSettings, customer_ids: list[UUID]) -> list[Record]:
    leads = target_tables(settings.target_schema).leads
    given = unnest("given", customer_global_id=array("customer_ids", sa.Uuid))
    newest = (
        _leads(leads)
        .where(leads.c.customer_global_id == given.c.customer_global_id)
        .order_by(leads.c.lead_no.desc().nulls_last())
        .limit(SHOWN_LEADS)
        .lateral("newest")
    )
    statement = sa.select(newest).select_from(given.join(newest, sa.true()))
    return [dict(row) for row in connection.execute(statement, {"customer_ids": customer_ids}).mappings()]


def _leads(leads: sa.Table) -> sa.Select[Any]:
    """给人看的列，与人做了什么；notes 只说写了没有。"""
    count: sa.ColumnElement[int] = sa.literal(0)
    for name in COUNTS:
        count = count + sa.func.coalesce(leads.c[name], 0)
    shown = ("lead_id", "customer_global_id", "lead_no", "current_stage", "opened_at", "last_order_at", "closed_at")
    return sa.select(
        *leads.c[shown],
        *leads.c["closed_by", "owner"],
        (sa.func.coalesce(trimmed(leads.c.notes), "") != "").label("has_notes"),
        count.label("order_count"),
        closed_by_person(leads).label("closed_by_person"),
        written_by_person(leads).label("written_by_person"),
        leads.c.updated_at,
    )


def _is_theirs(lead: Record, customer: Record) -> bool:
    return bool(lead["customer_global_id"] == customer["customer_global_id"])
