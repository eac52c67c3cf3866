"""customers 该是什么样：唯一的键、每个订单都有客户、非负的笔数、合计。都只看没有欠着的客户。"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import LookedAt, TableCheck
from etl_assets.core.etl_tables import order_index
from etl_assets.services.figures import COUNTS, matching_statuses, status_spellings
from etl_assets.services.order_index import of_customer, same_order
from etl_assets.services.table_checks import customers_looked_at, settled_customers
from etl_assets.services.vectorized_queries import read_frame


def _repeated(looked_at: LookedAt) -> sa.Select[Any]:
    return _settled_rows(looked_at).group_by(looked_at.tables.customers.c.customer_key).having(sa.func.count() > 1)


def _missing(looked_at: LookedAt) -> sa.Select[Any]:
    customers = looked_at.tables.customers.c
    owners = _orders_of(looked_at, settled_customers(looked_at, "customers")).distinct().subquery("owners")
    there = sa.select(customers.customer_key).where(customers.customer_key == owners.c.customer_key)
    return sa.select(owners.c.customer_key).where(~there.exists())


def _negative(looked_at: LookedAt) -> sa.Select[Any]:
    customers = looked_at.tables.customers.c
    return _settled_rows(looked_at).where(sa.or_(*[customers[name] < 0 for name in ("order_count", *COUNTS)]))


def _wrong_totals(looked_at: LookedAt) -> sa.Select[Any]:
    customers, orders = looked_at.tables.customers.c, looked_at.tables.orders.c
    is_cancelled = orders.latest_status == sa.any_(sa.cast(_read_cancelled(looked_at), sa.ARRAY(sa.Text)))
    counted = sa.not_(sa.func.coalesce(is_cancelled, sa.false()))
    of_orders = (
        _orders_of(looked_at, settled_customers(looked_at, "customers"))
        .add_columns(
            sa.func.count().filter(counted).label("order_count"),
            sa.func.coalesce(sa.func.sum(orders.amount).filter(counted), 0).label("total_amount"),
        )
        .group_by(order_index.c.customer_key)
        .subquery("of_orders")
    )
    wrong = sa.or_(*[customers[name].is_distinct_from(of_orders.c[name]) for name in ("order_count", "total_amount")])
    same_customer = customers.customer_key == of_orders.c.customer_key
    return sa.select(of_orders.c.customer_key).join(looked_at.tables.customers, same_customer).where(wrong)


def _settled_rows(looked_at: LookedAt) -> sa.Select[Any]:
    customer_key = looked_at.tables.customers.c.customer_key
    return sa.select(customer_key).where(
        customer_key.in_(sa.select(settled_customers(looked_at, "customers").c.customer_key))
    )


def _orders_of(looked_at: LookedAt, keys: sa.Subquery) -> sa.Select[Any]:
    """语句：这些客户的订单的 customer_key，一个订单一行。"""
    tables = looked_at.tables
    orders = sa.select(order_index.c.customer_key).join(tables.orders, same_order(tables.orders))
    return orders.join(keys, of_customer(keys.c.customer_key)).where(order_index.c.target == tables.schema)


def _read_cancelled(looked_at: LookedAt) -> list[str]:
    """要看的订单里，哪些状态的原文算取消；由 ETL 自己的 casefold 说了算，SQL 的 lower() 与它不同。"""
    theirs = _orders_of(looked_at, customers_looked_at(looked_at).subquery("keys"))
    statuses = theirs.with_only_columns(looked_at.tables.orders.c.latest_status).distinct()
    found = read_frame(looked_at.connection, statuses)
    return matching_statuses(status_spellings(found["latest_status"]), looked_at.settings.cancelled_statuses)


CHECKS = {
    "unique_keys": TableCheck("No customer_key is there twice.", _repeated, by_customer=True),
    "references": TableCheck("Every order belongs to a customer that is there.", _missing, by_customer=True),
    "non_negative": TableCheck("No customer has a negative count.", _negative, by_customer=True),
    "totals": TableCheck(
        "The orders of a customer that count, and their amounts, add up to the customer's order_count and total_amount.",
        _wrong_totals,
        by_customer=True,
    ),
}
