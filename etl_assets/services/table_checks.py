"""看一眼写出的表：唯一的键、引用、非负的笔数、合计。一个资产一条语句，也就是一个快照。

别的运行刚改了上游、还没轮到重算的客户不算错：它留下的到期日与陈旧标记，在同一个快照里看得见。
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, import_tasks, ledger, order_index, shop_configs, stale_customers, target_tables
from etl_assets.services.figures import FIGURES
from etl_assets.services.ledger import after
from etl_assets.services.rollout import read_share

CHECKS: Mapping[str, Mapping[str, str]] = {
    "orders": {
        "unique_keys": "No order (shop_id, order_id) is there twice.",
        "references": "Every order names a shop of shop_configs and an import of import_tasks.",
        "non_negative": "No order has a negative quantity.",
    },
    "customers": {
        "unique_keys": "No customer_key is there twice.",
        "references": "Every order belongs to a customer that is there.",
        "non_negative": "No customer has a negative count.",
        "totals": "The orders of a customer that count, and their amounts, add up to the customer's order_count and total_amount.",
    },
    "leads": {
        "unique_keys": "No lead (customer_global_id, lead_no) is there twice.",
        "references": "Every lead belongs to a customer that is there.",
        "non_negative": "No lead has a negative count.",
        "totals": "The leads of a customer add up to the customer's counts and amounts of each order type.",
    },
}
"""资产 → 检查 → 它说的话。"""


def count_violations(engine: sa.Engine, settings: EtlSettings, asset: str, days: DayRange | None) -> Mapping[str, int]:
    """检查 → 违反它的行数，0 就是通过。

    :param days: 只看这些天的订单，或这些天有订单的客户；None 是整张表。
    """
    build = {"orders": _check_orders, "customers": _check_customers, "leads": _check_leads}[asset]
    with translated_errors(), engine.connect() as connection:
        tables = target_tables(settings.target_schema)
        covered = read_share(connection, settings).covers_key(order_index.c.customer_key)
        violations = build(tables, settings, days, covered)
        counts = [
            sa.select(sa.func.count()).select_from(rows.subquery()).scalar_subquery().label(name) for name, rows in violations.items()
        ]
        return dict(connection.execute(sa.select(*counts)).mappings().one())


def _check_orders(
    tables: TargetTables, _settings: EtlSettings, days: DayRange | None, _covered: sa.ColumnElement[bool]
) -> Mapping[str, sa.Select[Any]]:
    orders = tables.orders.c
    looked_at = sa.true() if days is None else days.includes(orders.order_date)
    has_shop = sa.select(shop_configs.c.shop_id).where(shop_configs.c.shop_id == orders.shop_id).exists()
    has_import = sa.select(import_tasks.c.import_id).where(import_tasks.c.import_id == orders.import_id).exists()
    rows = sa.select(orders.order_id).where(looked_at)
    return {
        "unique_keys": rows.group_by(orders.shop_id, orders.order_id).having(sa.func.count() > 1),
        "references": rows.where(sa.not_(sa.and_(has_shop, has_import))),
        "non_negative": rows.where(orders.quantity < 0),
    }


def _check_customers(
    tables: TargetTables, settings: EtlSettings, days: DayRange | None, covered: sa.ColumnElement[bool]
) -> Mapping[str, sa.Select[Any]]:
    customers, orders = tables.customers.c, tables.orders.c
    keys = _settled_customers(tables, "customers", days, covered)
    rows = sa.select(customers.customer_key).where(customers.customer_key.in_(sa.select(keys.c.customer_key)))
    counted = sa.func.lower(orders.latest_status).not_in(list(settings.cancelled_statuses))
    of_orders = (
        sa.select(
            order_index.c.customer_key,
            sa.func.count().filter(counted).label("orders"),
            sa.func.coalesce(sa.func.sum(orders.amount).filter(counted), 0).label("amount"),
        )
        .join(tables.orders, _same_order(tables))
        .where(order_index.c.target == tables.schema, order_index.c.customer_key.in_(sa.select(keys.c.customer_key)))
        .group_by(order_index.c.customer_key)
        .subquery("of_orders")
    )
    same_customer = customers.customer_key == of_orders.c.customer_key
    wrong = sa.or_(customers.order_count != of_orders.c.orders, customers.total_amount != of_orders.c.amount)
    return {
        "unique_keys": rows.group_by(customers.customer_key).having(sa.func.count() > 1),
        "references": sa.select(of_orders.c.customer_key).where(~sa.select(customers.customer_key).where(same_customer).exists()),
        "non_negative": rows.where(sa.or_(customers.order_count < 0, *[customers[f"{kind}_count"] < 0 for kind in _KINDS])),
        "totals": sa.select(of_orders.c.customer_key).join(tables.customers, same_customer).where(wrong),
    }


def _check_leads(
    tables: TargetTables, _settings: EtlSettings, days: DayRange | None, covered: sa.ColumnElement[bool]
) -> Mapping[str, sa.Select[Any]]:
    customers, leads = tables.customers.c, tables.leads.c
    keys = _settled_customers(tables, "leads", days, covered)
    at_hand = (
        sa.select(customers.customer_global_id, *[customers[name] for name in FIGURES])
        .where(customers.customer_key.in_(sa.select(keys.c.customer_key)))
        .subquery("at_hand")
    )
    theirs = leads.customer_global_id.in_(sa.select(at_hand.c.customer_global_id))
    rows = sa.select(leads.lead_id).where(theirs if days else sa.true())
    of_leads = (
        sa.select(leads.customer_global_id, *[sa.func.sum(leads[name]).label(name) for name in FIGURES])
        .where(theirs)
        .group_by(leads.customer_global_id)
        .subquery("of_leads")
    )
    same_customer = of_leads.c.customer_global_id == at_hand.c.customer_global_id
    wrong = sa.or_(*[sa.func.coalesce(of_leads.c[name], 0) != at_hand.c[name] for name in FIGURES])
    has_customer = sa.select(customers.customer_key).where(customers.customer_global_id == leads.customer_global_id).exists()
    return {
        "unique_keys": sa.select(leads.lead_no)
        .where(theirs if days else sa.true())
        .group_by(leads.customer_global_id, leads.lead_no)
        .having(sa.func.count() > 1),
        "references": rows.where(~has_customer),
        "non_negative": rows.where(sa.or_(*[leads[f"{kind}_count"] < 0 for kind in _KINDS])),
        "totals": sa.select(at_hand.c.customer_global_id).outerjoin(of_leads, same_customer).where(wrong),
    }


_KINDS = ("sample", "proof", "bulk")


def _same_order(tables: TargetTables) -> sa.ColumnElement[bool]:
    return sa.and_(order_index.c.shop_id == tables.orders.c.shop_id, order_index.c.order_id == tables.orders.c.order_id)


def _settled_customers(tables: TargetTables, asset: str, days: DayRange | None, covered: sa.ColumnElement[bool]) -> sa.Subquery:
    """份额之内、这些天有订单、`asset` 与它的上游都没有欠着的客户。"""
    target = tables.schema
    chain = [name for name in ("customers", "leads") if name == asset or asset in after(name)]
    due_days = sa.select(ledger.c.day).where(
        ledger.c.target == target, ledger.c.asset.in_(["orders", *chain]), ledger.c.requested > ledger.c.materialized
    )
    stale = sa.select(stale_customers.c.customer_key).where(stale_customers.c.target == target, stale_customers.c.asset.in_(chain))
    owing = sa.select(order_index.c.customer_key).where(order_index.c.target == target, order_index.c.order_date.in_(due_days)).union(stale)
    keys = (
        sa.select(order_index.c.customer_key)
        .distinct()
        .where(order_index.c.target == target, covered, order_index.c.customer_key.not_in(owing))
    )
    if days is not None:
        of_days = (
            sa.select(order_index.c.customer_key).join(tables.orders, _same_order(tables)).where(days.includes(tables.orders.c.order_date))
        )
        keys = keys.where(order_index.c.customer_key.in_(of_days))
    return keys.subquery("settled")
