"""客户 ETL：手头客户的全部历史订单 → 一行一个客户。规则见 DOMAIN 第 4 节。"""

from __future__ import annotations

from functools import partial

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import own_columns, touched
from etl_assets.customers.description import define_customers
from etl_assets.services.batch import transform_batches
from etl_assets.services.customer_keys import nickname_of_key
from etl_assets.services.customer_orders import Computed, compute_in_bites, read_customer_ids, read_customer_orders
from etl_assets.services.figures import FIGURES, aggregate_figures, total_amount, zero_figures
from etl_assets.services.materialization import AssetReport, DataTransaction, RunContext, data_transaction
from etl_assets.services.people import give_way
from etl_assets.services.vectorized_queries import Upsert, WriteCounts, upsert_frame

_WRITTEN = [column.name for column in own_columns(define_customers(sa.MetaData(), "public"))]
CUSTOMER_UPSERT = Upsert(key=("customer_key",), insert_only=("customer_global_id",), touch="updated_at")


def materialize_customers(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让这些天有订单的客户与全部陈旧的客户都正确。"""
    begin = partial(data_transaction, engine, settings, asset="customers", days=days, run=run)
    return compute_in_bites(begin, write=write_customers, complete=complete)


def complete(transaction: DataTransaction, computed: Computed) -> AssetReport:
    return transaction.complete(computed.revisions, scope=computed.scope, written=computed.written)


def write_customers(transaction: DataTransaction, at_hand: sa.Table, known: pl.DataFrame) -> WriteCounts:
    """读、算、写锁住的客户。"""
    customers = transform_batches(read_customer_orders(transaction, at_hand), lambda orders: transform(orders, known))
    return load(transaction, customers, known, at_hand)


def transform(orders: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """客户的全部订单（已排序）→ 一行一个还有订单的客户；没有订单的客户不出现。

    昵称取最新的订单，不论状态；其余数字只算未取消的订单。
    """
    counted = pl.col("is_counted")
    nicknames = orders.group_by("customer_key").agg(pl.col("customer_nickname").last())
    figures = (
        orders.filter(counted)
        .group_by("customer_key")
        .agg(
            pl.col("ordered_at").min().alias("first_order_at"),
            pl.col("ordered_at").max().alias("last_order_at"),
            pl.len().cast(pl.Int32).alias("order_count"),
            total_amount().alias("total_amount"),
            *aggregate_figures(),
        )
    )
    zeros = ["order_count", "total_amount", *FIGURES]
    return _columns(
        nicknames.join(figures, on="customer_key", how="left")
        .with_columns(pl.col(zeros).fill_null(0))
        .join(known, on="customer_key", how="left")
    )


def transform_orderless(known: pl.DataFrame) -> pl.DataFrame:
    """不再有订单、却因为有人碰过其商机而留下的客户：数字归零，昵称取自 customer_key。"""
    return _columns(
        known.with_columns(
            nickname_of_key().alias("customer_nickname"),
            pl.lit(None, pl.Datetime("us", "UTC")).alias("first_order_at"),
            pl.lit(None, pl.Datetime("us", "UTC")).alias("last_order_at"),
            pl.lit(0, pl.Int32).alias("order_count"),
            pl.lit(0).cast(pl.Decimal(20, 2)).alias("total_amount"),
            *zero_figures(),
        )
    )


def load(transaction: DataTransaction, customers: pl.DataFrame, known: pl.DataFrame, at_hand: sa.Table) -> WriteCounts:
    """写有订单的客户；没有订单的连同没人碰过的商机一起删去，删不掉的归零。"""
    connection, table = transaction.connection, transaction.tables.customers
    written = upsert_frame(connection, customers, table, CUSTOMER_UPSERT)
    orderless = known.join(customers, on="customer_key", how="anti").filter("is_known")
    if orderless.is_empty():
        return written
    deleted = delete_untouched(transaction, orderless)
    # 删过之后再读一遍：还在的，是人碰过商机、删不掉的
    remaining = (
        read_customer_ids(transaction, at_hand).join(orderless, on="customer_key", how="semi").filter("is_known")
    )
    return written + deleted + upsert_frame(connection, transform_orderless(remaining), table, CUSTOMER_UPSERT)


def delete_untouched(transaction: DataTransaction, orderless: pl.DataFrame) -> WriteCounts:
    """删去这些客户没人碰过的商机，再删去没有商机剩下的客户。

    条件在 DELETE 里对最新的行求值，所以有人刚提交的关闭不会被删掉。
    """
    customers, leads = transaction.tables.customers, transaction.tables.leads
    ids = sa.cast(orderless["customer_global_id"].to_list(), sa.ARRAY(sa.Uuid))
    theirs = leads.c.customer_global_id == sa.any_(ids)
    # NOWAIT：锁着几个商机去等人手里的另一个，就可能与他互相等着，而输的也许是他
    gone = sa.select(leads.c.lead_id).where(theirs, ~touched(leads)).with_for_update(nowait=True).cte("gone")
    delete = sa.delete(leads).where(leads.c.lead_id == gone.c.lead_id, ~touched(leads))
    give_way(transaction.connection, transaction.settings, delete, parameters={})
    has_leads = sa.select(leads.c.lead_id).where(leads.c.customer_global_id == customers.c.customer_global_id).exists()
    deleted = transaction.connection.execute(
        sa.delete(customers).where(customers.c.customer_global_id == sa.any_(ids), ~has_leads)
    )
    return WriteCounts(deleted=deleted.rowcount)


def _columns(customers: pl.DataFrame) -> pl.DataFrame:
    return customers.with_columns(shop_id=pl.col("customer_key").str.head(36)).select(_WRITTEN)
