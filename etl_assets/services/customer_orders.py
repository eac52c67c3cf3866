"""手头的客户与他们的全部订单：customers 与 leads 两个 ETL 的共同输入。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.tables import TargetTables, order_index
from etl_assets.services.batch import CUSTOMERS_PER_BATCH, whole_groups
from etl_assets.services.customer_keys import customer_id
from etl_assets.services.figures import has_status, status_spellings
from etl_assets.services.ledger import Revisions, before
from etl_assets.services.locks import lock_customers
from etl_assets.services.materialization import DataTransaction
from etl_assets.services.order_index import adopt_orders, read_marks, stage_customers
from etl_assets.services.vectorized_queries import read_frame, reading_ahead


@dataclass(frozen=True)
class CustomersAtHand:
    """锁住的客户：临时表与批数、读数据之前的台账版本、要消掉的陈旧标记。"""

    table: sa.Table
    batches: int
    revisions: Revisions
    marks: Sequence[int]

    def batch(self, number: int) -> sa.Subquery:
        """第 number 批的客户（从 0 起）。"""
        return _batch(self.table, number * CUSTOMERS_PER_BATCH, CUSTOMERS_PER_BATCH)


def lock_customers_at_hand(transaction: DataTransaction) -> CustomersAtHand:
    """选定并锁住这次要算的客户。先读台账再选客户：选定之后才来的要求由下一次运行做。"""
    connection, target, asset = transaction.connection, transaction.target, transaction.asset
    revisions = transaction.read_revisions()
    if before(asset) not in transaction.run.assets:  # 同一运行里的上游刚写过索引
        adopt_orders(connection, transaction.tables, transaction.days, transaction.share)
    table, count = stage_customers(connection, transaction.tables, asset, transaction.days, transaction.share)
    lock_customers(connection, target, table)
    batches = -(-count // CUSTOMERS_PER_BATCH)
    return CustomersAtHand(table=table, batches=batches, revisions=revisions, marks=read_marks(connection, target, asset, table))


def read_customer_orders(transaction: DataTransaction, at_hand: sa.FromClause) -> Iterator[pl.DataFrame]:
    """手头客户的全部订单，一行一个订单，分成若干帧：一个客户的订单都在同一帧，按 (customer_key, ordered_at, order_id) 排好。

    is_counted：状态不在取消之列；is_completed：状态在完成之列而不在取消之列。读完之前连接不能作他用。
    """
    settings = transaction.settings
    with reading_ahead(transaction.connection, _customer_orders(transaction.tables, at_hand)) as frames:
        for frame in whole_groups(frames, "position"):
            spellings = status_spellings(frame["latest_status"])
            cancelled, completed = has_status(spellings, settings.cancelled_statuses), has_status(spellings, settings.completed_statuses)
            marked = frame.drop("position").with_columns(is_counted=~cancelled, is_completed=completed & ~cancelled)
            yield marked.sort("customer_key", "ordered_at", "order_id")


def read_customer_ids(transaction: DataTransaction, at_hand: sa.FromClause) -> pl.DataFrame:
    """手头客户一行一个：customer_key 与 customer_global_id；customers 里已有的 id 优先，is_known 表示已有。"""
    existing = read_frame(transaction.connection, _customer_ids(transaction.tables, at_hand))
    known = pl.col("customer_global_id").is_not_null().alias("is_known")
    return existing.with_columns(known, pl.coalesce("customer_global_id", customer_id()).alias("customer_global_id"))


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=64)
def _batch(customers: sa.Table, first: int, size: int) -> sa.Subquery:
    of_batch = sa.and_(customers.c.position >= first, customers.c.position < first + size)  # 区间：规划器估得准有几行
    return sa.select(customers.c.customer_key, customers.c.position).where(of_batch).subquery("at_hand")


@lru_cache(maxsize=64)
def _customer_orders(tables: TargetTables, at_hand: sa.FromClause) -> sa.Select[Any]:
    orders = tables.orders
    columns: list[sa.ColumnElement[Any]] = [
        at_hand.c.position,
        order_index.c.customer_key,
        *[
            orders.c[name]
            for name in ("order_id", "customer_nickname", "latest_status", "system_order_type", "amount", "ordered_at", "order_date")
        ],
    ]
    return (
        sa.select(*columns)
        .select_from(at_hand)
        .join(order_index, order_index.c.customer_key == at_hand.c.customer_key)
        .join(orders, sa.and_(orders.c.shop_id == order_index.c.shop_id, orders.c.order_id == order_index.c.order_id))
        .where(order_index.c.target == tables.schema)
        .order_by(at_hand.c.position)
    )


@lru_cache(maxsize=64)
def _customer_ids(tables: TargetTables, at_hand: sa.FromClause) -> sa.Select[Any]:
    customers = tables.customers
    return sa.select(at_hand.c.customer_key, customers.c.customer_global_id).outerjoin(
        customers, customers.c.customer_key == at_hand.c.customer_key
    )
