"""这些天的 orders → 一行一天一种订单类型。"""

from __future__ import annotations

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.services.figures import total_amount
from etl_assets.services.materialization import (
    AssetReport,
    DataTransaction,
    RunContext,
    data_transaction,
    retry_conflicts,
)
from etl_assets.services.vectorized_queries import Upsert, WriteCounts, read_frame, upsert_frame


@retry_conflicts
def materialize_products(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    with data_transaction(engine, settings, asset="products", days=days, run=run, locked=days) as transaction:
        revisions = transaction.read_revisions()
        written = load(transaction, transform(extract(transaction)))
        return transaction.complete(revisions, scope="whole", written=written)


def extract(transaction: DataTransaction) -> pl.DataFrame:
    orders = transaction.tables.orders.c
    rows = sa.select(orders.order_date.label("day"), orders.system_order_type, orders.amount)
    return read_frame(transaction.connection, rows.where(transaction.days.includes(orders.order_date)))


def transform(orders: pl.DataFrame) -> pl.DataFrame:
    """一行一个订单 → 一行一天一种类型；没有订单的不出现。"""
    return orders.group_by("day", "system_order_type").agg(
        pl.len().cast(pl.Int32).alias("order_count"), total_amount().alias("amount")
    )


def load(transaction: DataTransaction, totals: pl.DataFrame) -> WriteCounts:
    products, orders = transaction.tables.products, transaction.tables.orders.c
    written = upsert_frame(
        transaction.connection, totals, products, Upsert(key=("day", "system_order_type"), touch="updated_at")
    )
    sold = sa.select(orders.order_id).where(
        orders.order_date == products.c.day, orders.system_order_type == products.c.system_order_type
    )
    gone = sa.delete(products).where(transaction.days.includes(products.c.day), ~sold.exists())
    return written + WriteCounts(deleted=transaction.connection.execute(gone).rowcount)
