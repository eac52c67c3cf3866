"""看一眼写出的表：每个资产的描述里的检查。

整张表按客户一口一个快照：每条语句读的、占的内存都有界，也不拦着清理。别的运行刚改了上游、还没轮到重算的客户不算错：它留下的
到期日与陈旧标记，在同一个快照里看得见。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import LookedAt
from etl_assets.core.asset_folders import checks_of
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.etl_tables import ledger, order_index, stale_customers
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import customer_hash, target_tables
from etl_assets.ledger.graph import line_of
from etl_assets.services.day_rows import customers_with_orders, rows_on
from etl_assets.services.order_index import of_customer
from etl_assets.services.rollout import read_share

ORDERS_PER_BITE = 500_000
"""看整张表时，一口的客户大约有这么多订单。"""
_HASHES = 2**64
_LOWEST_HASH = -(2**63)


def count_violations(engine: sa.Engine, settings: EtlSettings, asset: str, days: DayRange | None) -> Mapping[str, int]:
    """检查 → 违反它的行数，0 就是通过。

    :param days: 只看这些天的行，或这些天有订单的客户；None 是整张表。
    """
    checks = checks_of(asset)
    tables = target_tables(settings.target_schema)
    rows = sa.select(*tables.of_asset[asset].primary_key)
    if days is not None:
        rows = rows.where(rows_on(tables, asset, days.includes))
    violations: Counter[str] = Counter()
    with translated_errors():
        for by_customer in {check.by_customer for check in checks.values()}:
            wanted = {name: check for name, check in checks.items() if check.by_customer == by_customer}
            for hashes in _bites(engine, days) if by_customer else [None]:
                with engine.connect().execution_options(isolation_level="REPEATABLE READ") as snapshot:
                    looked_at = LookedAt(snapshot, settings, tables, rows, days, hashes)
                    violations.update(
                        _count(snapshot, {name: check.violations(looked_at) for name, check in wanted.items()})
                    )
    return violations


def _bites(engine: sa.Engine, days: DayRange | None) -> Sequence[tuple[int, int] | None]:
    """散列的若干段，合起来是全部客户；多少段看统计里的行数，没有统计的是小表。"""
    if days is not None:
        return [None]
    # 估数就够：只为分几口，数一遍倒要读完整张索引表
    size = sa.text("SELECT reltuples FROM pg_class WHERE oid = CAST(:name AS regclass)")
    with engine.connect() as connection:
        orders: float = connection.execute(size, {"name": order_index.fullname}).scalar_one()
    count = int(orders // ORDERS_PER_BITE) + 1 if orders > 0 else 1
    edges = [_LOWEST_HASH + _HASHES * number // count for number in range(count + 1)]
    return [None] if count == 1 else [(first, after - 1) for first, after in pairwise(edges)]


def _count(connection: sa.Connection, violations: Mapping[str, sa.Select[Any] | Sequence[object]]) -> Mapping[str, int]:
    counts = {name: len(found) for name, found in violations.items() if not isinstance(found, sa.Select)}
    queries = {name: found.subquery() for name, found in violations.items() if isinstance(found, sa.Select)}
    counted = [
        sa.select(sa.func.count()).select_from(rows).scalar_subquery().label(name) for name, rows in queries.items()
    ]
    return {**counts, **(connection.execute(sa.select(*counted)).mappings().one() if counted else {})}


# ---- 按客户看的检查所用 -------------------------------------------------------------


def customers_looked_at(looked_at: LookedAt) -> sa.Select[tuple[str]]:
    """语句：这一口的客户，份额之内的，一行一个。有 days 就从那些天的订单出发，不读整个索引。"""
    tables, days = looked_at.tables, looked_at.days
    if days is None:
        keys = sa.select(order_index.c.customer_key).where(order_index.c.target == tables.schema)
    else:
        keys = customers_with_orders(tables, days.includes(tables.orders.c.order_date))
    covered = read_share(looked_at.connection, looked_at.settings).covers_key(order_index.c.customer_key)
    keys = keys.distinct().where(covered)
    if looked_at.hashes is None:
        return keys
    first, last = looked_at.hashes
    of_key = customer_hash(order_index.c.customer_key)
    return keys.where(of_key <= last, *([of_key >= first] if first > _LOWEST_HASH else []))  # 最小的 bigint 写不成常数


def settled_customers(looked_at: LookedAt, asset: str) -> sa.Subquery:
    """要看的客户中，`asset` 与它的上游都没有欠着的。欠着的用反联接去掉：NOT IN 多了就装不进散列，一行一行地比。"""
    target = looked_at.tables.schema
    line = line_of(target, asset)
    keys = customers_looked_at(looked_at).subquery("keys")
    key = keys.c.customer_key
    is_stale = (
        sa.select(stale_customers.c.mark_id)
        .where(
            stale_customers.c.target == target, stale_customers.c.asset.in_(line), stale_customers.c.customer_key == key
        )
        .exists()
    )
    is_due = (
        sa.select(order_index.c.order_id)
        .join(ledger, ledger.c.day == order_index.c.order_date)
        .where(
            of_customer(key),
            order_index.c.target == target,
            ledger.c.target == target,
            ledger.c.asset.in_(line),
            ledger.c.requested > ledger.c.materialized,
        )
        .exists()
    )
    return sa.select(key).where(~is_stale, ~is_due).subquery("settled")
