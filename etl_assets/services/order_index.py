"""订单 → 客户的索引：与订单同一事务写下，找一个客户的订单不用扫全表；订单离开的客户在这里记为陈旧。"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import TargetTables, order_index, stale_customers
from etl_assets.services.batch import CUSTOMERS_PER_BATCH
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.locks import lock_days
from etl_assets.services.vectorized_queries import Upsert, read_frame, stage_frame, upsert_staged

CUSTOMER_ASSETS = ("customers", "leads")
"""按客户计算的资产：各有自己的陈旧标记。"""


def index_orders(connection: sa.Connection, target: str, orders: pl.DataFrame) -> None:
    """更新这些订单的索引（列：shop_id、order_id、customer_nickname、order_date），换了客户的先给旧客户记陈旧。"""
    frame = orders.select(pl.lit(target).alias("target"), "shop_id", "order_id", "customer_nickname", customer_key(), "order_date")
    staging = stage_frame(connection, frame, name="staged_index", like=order_index)
    moved = sa.select(order_index.c.customer_key).join(
        staging,
        sa.and_(
            _same_order(staging),
            order_index.c.target == target,
            order_index.c.customer_key != staging.c.customer_key,
        ),
    )
    mark_stale(connection, target, moved)
    upsert_staged(connection, staging, order_index, Upsert(key=("target", "shop_id", "order_id")))
    staging.drop(connection)


def unindex_orders(connection: sa.Connection, target: str, gone: sa.Table) -> None:
    """这些订单（shop_id、order_id）没有了：给它们的客户记陈旧，删去索引。"""
    theirs = sa.and_(_same_order(gone), order_index.c.target == target)
    mark_stale(connection, target, sa.select(order_index.c.customer_key).join(gone, theirs))
    connection.execute(sa.delete(order_index).where(theirs))


def mark_stale(connection: sa.Connection, target: str, customer_keys: sa.Select[tuple[str]]) -> None:
    """给每个按客户计算的资产各记一个标记；标记只增不改，谁修好谁删。"""
    keys = customer_keys.distinct().subquery("keys")
    for asset in CUSTOMER_ASSETS:
        marks = sa.select(sa.literal(target), sa.literal(asset), keys.c.customer_key)
        connection.execute(pg.insert(stale_customers).from_select(["target", "asset", "customer_key"], marks))


def stage_customers(connection: sa.Connection, target: str, asset: str, days: DayRange) -> sa.Table:
    """临时表 customers_at_hand：这些天有订单的客户，加上该资产全部陈旧的客户；batch 从 0 起给他们分批。"""
    on_days = sa.select(order_index.c.customer_key).where(order_index.c.target == target, days.includes(order_index.c.order_date))
    stale = sa.select(stale_customers.c.customer_key).where(stale_customers.c.target == target, stale_customers.c.asset == asset)
    keys = on_days.union(stale).subquery("keys")
    at_hand = sa.Table(
        "customers_at_hand",
        sa.MetaData(),
        sa.Column("customer_key", sa.Text, primary_key=True),
        sa.Column("batch", sa.Integer, nullable=False),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    at_hand.create(connection)
    position = sa.func.row_number().over(order_by=keys.c.customer_key) - 1
    numbered = sa.select(keys.c.customer_key, position // CUSTOMERS_PER_BATCH)
    connection.execute(pg.insert(at_hand).from_select(["customer_key", "batch"], numbered))
    connection.exec_driver_sql("ANALYZE customers_at_hand")
    return at_hand


def read_marks(connection: sa.Connection, target: str, asset: str, at_hand: sa.Table) -> Sequence[int]:
    """手头客户此刻的标记；锁住客户之后、读订单之前读，所以只消掉确实修好的。"""
    return connection.scalars(
        sa.select(stale_customers.c.mark_id)
        .join(at_hand, at_hand.c.customer_key == stale_customers.c.customer_key)
        .where(stale_customers.c.target == target, stale_customers.c.asset == asset)
    ).all()


def consume_marks(connection: sa.Connection, mark_ids: Sequence[int]) -> None:
    """删去修好的标记；事务失败则标记还在。"""
    ids = sa.cast(list(mark_ids), sa.ARRAY(sa.BigInteger))
    connection.execute(sa.delete(stale_customers).where(stale_customers.c.mark_id == sa.any_(ids)))


def adopt_orders(connection: sa.Connection, tables: TargetTables, days: DayRange) -> int:
    """把别的 ETL 写进 orders 的行收进索引（这些天的、索引里没有或不符的）；返回收进的行数。"""
    if _foreign_orders(connection, tables, days).is_empty() and not _vanished_orders(connection, tables, days, limit=1):
        return 0
    lock_days(connection, tables.schema, days)  # 自己的 orders 运行可能正在写这些行：锁住再看一次
    foreign = _foreign_orders(connection, tables, days)
    index_orders(connection, tables.schema, foreign)
    vanished = _vanished_orders(connection, tables, days)
    gone = stage_frame(
        connection,
        pl.DataFrame(vanished, schema={"shop_id": pl.String, "order_id": pl.String}, orient="row"),
        name="vanished_orders",
        like=order_index,
    )
    unindex_orders(connection, tables.schema, gone)
    gone.drop(connection)
    return foreign.height + len(vanished)


def _same_order(other: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(order_index.c.shop_id == other.c.shop_id, order_index.c.order_id == other.c.order_id)


def _foreign_orders(connection: sa.Connection, tables: TargetTables, days: DayRange) -> pl.DataFrame:
    orders = tables.orders
    indexed = sa.and_(_same_order(orders), order_index.c.target == tables.schema)
    return read_frame(
        connection,
        sa.select(orders.c.shop_id, orders.c.order_id, orders.c.customer_nickname, orders.c.order_date)
        .outerjoin(order_index, indexed)
        .where(
            days.includes(orders.c.order_date),
            orders.c.customer_nickname.is_not(None),
            sa.or_(
                order_index.c.order_id.is_(None),
                order_index.c.customer_nickname.is_distinct_from(orders.c.customer_nickname),
                order_index.c.order_date.is_distinct_from(orders.c.order_date),
            ),
        ),
    )


def _vanished_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, limit: int | None = None) -> list[tuple[str, str]]:
    existing = sa.select(tables.orders.c.order_id).where(_same_order(tables.orders)).exists()
    rows = connection.execute(
        sa.select(order_index.c.shop_id, order_index.c.order_id)
        .where(order_index.c.target == tables.schema, days.includes(order_index.c.order_date), ~existing)
        .limit(limit)
    )
    return [(str(shop_id), order_id) for shop_id, order_id in rows]
