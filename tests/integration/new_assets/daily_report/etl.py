"""这些天的 products 与有订单的 customers → 一行一天。"""

from __future__ import annotations

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.services.day_rows import customers_with_orders
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
def materialize_daily_report(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    with data_transaction(engine, settings, asset="daily_report", days=days, run=run, locked=days) as transaction:
        revisions = transaction.read_revisions()
        written = load(transaction, transform(read_totals(transaction), read_buyers(transaction)))
        return transaction.complete(revisions, scope="whole", written=written)


def read_totals(transaction: DataTransaction) -> pl.DataFrame:
    products = transaction.tables.products.c
    rows = sa.select(products.day, products.order_count, products.amount)
    return read_frame(transaction.connection, rows.where(transaction.days.includes(products.day)))


def read_buyers(transaction: DataTransaction) -> pl.DataFrame:
    """一行一个客户的一天，他还在 customers 里。"""
    day, customers = transaction.tables.orders.c.order_date, transaction.tables.customers.c
    bought = customers_with_orders(transaction.tables, transaction.days.includes(day)).add_columns(day.label("day"))
    bought_on = bought.distinct().subquery()
    there = sa.select(bought_on.c.day).join(
        transaction.tables.customers, customers.customer_key == bought_on.c.customer_key
    )
    return read_frame(transaction.connection, there)


def transform(totals: pl.DataFrame, buyers: pl.DataFrame) -> pl.DataFrame:
    """一行一天；没有订单的不出现。"""
    orders = totals.group_by("day").agg(pl.col("order_count").sum().cast(pl.Int32), total_amount().alias("amount"))
    customers = buyers.group_by("day").agg(pl.len().cast(pl.Int32).alias("customer_count"))
    return orders.join(customers, on="day", how="left").with_columns(pl.col("customer_count").fill_null(0))


def load(transaction: DataTransaction, report: pl.DataFrame) -> WriteCounts:
    table, products = transaction.tables.daily_report, transaction.tables.products.c
    written = upsert_frame(transaction.connection, report, table, Upsert(key=("day",), touch="updated_at"))
    reported = sa.select(products.day).where(products.day == table.c.day).exists()
    gone = transaction.connection.execute(sa.delete(table).where(transaction.days.includes(table.c.day), ~reported))
    return written + WriteCounts(deleted=gone.rowcount)
