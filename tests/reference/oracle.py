"""参照实现的入口：三张表该是什么、现在是什么、差在哪里，以及每一行的去向。

既有的编号与人的列取自目标表，所以要在被测的运行 *之前* 算 `expected`，才看得出运行写错了编号或动了人的列。
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from uuid import UUID

import sqlalchemy as sa

from tests.reference import database
from tests.reference.customers import build_customer, build_left_customer, count_in
from tests.reference.identities import build_customer_key, new_customer_id
from tests.reference.leads import build_empty_lead, build_leads
from tests.reference.orders import Order, build_order, build_order_row
from tests.reference.raw_orders import JudgedRow, clean, judge, pick_winners
from tests.reference.result import Result, Row, differences
from tests.reference.settings import ReferenceSettings

__all__ = ["Accounting", "ReferenceSettings", "Result", "Split", "accounting", "actual", "differences", "expected"]


@dataclass
class Split:
    """若干原始行的去向，各几行。"""

    loaded: int = 0
    superseded: int = 0
    rejected: int = 0


@dataclass
class Accounting:
    """有行的每次导入、每个业务日各自的去向；没有业务日的行只在它的导入里。"""

    by_import: dict[UUID, Split] = field(default_factory=dict)
    by_day: dict[date, Split] = field(default_factory=dict)


def expected(connection: sa.Connection, settings: ReferenceSettings, *, target_schema: str = "public") -> Result:
    """三张表与被拒的行收敛以后必须是什么；只读。"""
    judged = _judge_rows(connection, settings)
    find_mapped_type = cache(partial(database.find_mapped_type, connection))
    orders = [_build_order(winner, find_mapped_type) for winner in pick_winners(judged)]
    customers, leads = _build_customers_and_leads(connection, settings, target_schema, orders)
    return Result(
        orders=[build_order_row(order) for order in orders],
        customers=customers,
        leads=leads,
        rejected=[
            {"raw_id": row.raw.raw_id, "import_id": row.raw.import_id, "rule": row.rule, "day": row.day}
            for row in judged
            if row.rule is not None
        ],
    )


def actual(connection: sa.Connection, *, target_schema: str = "public") -> Result:
    """目标表现在的内容，与 `expected` 同形。"""
    return Result(
        orders=database.read_orders(connection, target_schema),
        customers=database.read_customers(connection, target_schema),
        leads=database.read_leads(connection, target_schema),
        rejected=database.read_rejected(connection, target_schema),
    )


def accounting(connection: sa.Connection, settings: ReferenceSettings) -> Accounting:
    """范围内的每一行：成了订单、被更新的行取代，或被拒。"""
    judged = _judge_rows(connection, settings)
    loaded = {winner.raw.raw_id for winner in pick_winners(judged)}
    result = Accounting()
    for row in judged:
        splits = [result.by_import.setdefault(row.raw.import_id, Split())]
        if row.day is not None:
            splits.append(result.by_day.setdefault(row.day, Split()))
        for split in splits:
            if row.rule is not None:
                split.rejected += 1
            elif row.raw.raw_id in loaded:
                split.loaded += 1
            else:
                split.superseded += 1
    return result


def _judge_rows(connection: sa.Connection, settings: ReferenceSettings) -> list[JudgedRow]:
    judged = []
    find_shop_id = cache(partial(database.find_shop_id, connection))
    for raw in map(clean, database.read_raw_rows(connection)):
        shop_id = find_shop_id(raw.shop) if raw.shop is not None else None
        judged.append(judge(raw, shop_id, settings))
    return judged


def _build_order(winner: JudgedRow, find_mapped_type: Callable[[str], str | None]) -> Order:
    raw_type = winner.raw.order_type
    return build_order(winner, find_mapped_type(raw_type) if raw_type is not None else None)


def _group_by_customer(orders: Iterable[Order]) -> dict[str, list[Order]]:
    groups: defaultdict[str, list[Order]] = defaultdict(list)
    for order in orders:
        groups[build_customer_key(order.shop_id, order.customer_nickname)].append(order)
    return groups


def _build_customers_and_leads(
    connection: sa.Connection, settings: ReferenceSettings, schema: str, orders: list[Order]
) -> tuple[list[Row], list[Row]]:
    customers: list[Row] = []
    leads: list[Row] = []
    named = _group_by_customer(orders)
    stored_customers = database.read_stored_customers(connection, schema)
    ids = {customer.customer_key: customer.customer_global_id for customer in stored_customers}
    stored_leads = database.read_stored_leads(connection, schema)
    newest_day = max((order.order_date for order in orders), default=date.min)
    for customer_key, own_orders in named.items():
        customer_id = ids.get(customer_key) or new_customer_id(customer_key)
        stored = stored_leads.get(customer_id, [])
        customers.append(build_customer(customer_id, customer_key, own_orders, settings))
        leads += build_leads(customer_id, customer_key, count_in(own_orders, settings), stored, newest_day, settings)
    # 没有编号的商机是人放进来的：整行不动，他的客户也留着
    unnumbered = database.read_unnumbered_leads(connection, schema)
    leads += unnumbered
    holders = {row["customer_global_id"] for row in unnumbered}
    # 没有订单提到的客户：只在有人动过他的商机时留下
    for customer in stored_customers:
        if customer.customer_key in named:
            continue
        kept = [lead for lead in stored_leads.get(customer.customer_global_id, []) if lead.is_touched]
        if kept or customer.customer_global_id in holders:
            customers.append(build_left_customer(customer))
            leads += map(build_empty_lead, kept)
    # 客户那一行已经不在的商机：有人动过的留下，别的清掉；客户此刻重新出现的，上面已经算过
    known = {row["customer_global_id"] for row in customers}
    leads += [
        build_empty_lead(lead)
        for lead in database.read_ownerless_leads(connection, schema)
        if lead.is_touched and lead.customer_global_id not in known
    ]
    return customers, leads
