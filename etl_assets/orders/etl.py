"""订单 ETL：读出手头订单的全部版本，选出赢家，整批写入。规则见 DOMAIN 第 3 节。"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import TooManyDeletesError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import order_index, order_type_mappings, rejected_rows
from etl_assets.services import raw_rows
from etl_assets.services.batch import transform_batches
from etl_assets.services.ledger import Revisions, days_allowing_deletes
from etl_assets.services.locks import lock_days
from etl_assets.services.materialization import AssetReport, DataTransaction, RunContext, data_transaction, retry_conflicts
from etl_assets.services.order_index import index_orders, mark_stale, unindex_orders
from etl_assets.services.vectorized_queries import Upsert, WriteCounts, read_batches, read_frame, stage_frame, upsert_staged

SYSTEM_ORDER_TYPES = ("SAMPLE", "PROOF", "BULK")
ALWAYS_ALLOWED_DELETES = 20

ORDER_UPSERT = Upsert(key=("shop_id", "order_id"), touch="updated_at")


@dataclass(frozen=True)
class Versions:
    """手头订单的原始版本（已评判，一行一条原始记录），以及类型映射。"""

    judged: pl.DataFrame
    type_mappings: pl.DataFrame
    revisions: Revisions


@dataclass(frozen=True)
class TransformedOrders:
    """orders：一行一个手头的订单。rejected：区间内一行一条被拒收的原始记录。"""

    orders: pl.DataFrame
    rejected: pl.DataFrame


@retry_conflicts
def materialize_orders(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让这些天有有效版本、或在 orders 里有行的每个订单都正确。

    :raises TooManyDeletesError: 要删的订单太多而没人允许；什么也没写。
    """
    with data_transaction(engine, settings, asset="orders", days=days, run=run) as transaction:
        versions = extract(transaction)
        result = transform(versions.judged, versions.type_mappings, days)
        written = load(transaction, result)
        return transaction.complete(versions.revisions, written=written, rejected=result.rejected.height)


def extract(transaction: DataTransaction) -> Versions:
    """锁住手头订单所有版本的业务日，再读它们。

    锁了才读，读出的版本若落在没锁的日子，就放开重锁：否则一个较旧的快照可能盖过较新的。
    """
    connection = transaction.connection
    locked = set(transaction.days)
    while True:
        savepoint = connection.begin_nested()
        lock_days(connection, transaction.target, locked)
        revisions = transaction.read_revisions()
        judged = transform_batches(read_batches(connection, versions_at_hand(transaction)), raw_rows.judge)
        elsewhere = raw_rows.closure_days(judged) - locked
        if not elsewhere:
            break
        savepoint.rollback()
        locked |= elsewhere
    mappings = read_frame(connection, sa.select(order_type_mappings.c.raw_order_type, order_type_mappings.c.system_order_type))
    return Versions(judged=judged, type_mappings=mappings, revisions=revisions)


def versions_at_hand(transaction: DataTransaction) -> sa.Select[tuple[object, ...]]:
    """区间内的全部行，加上同样那些订单在别的日子的版本。"""
    orders = transaction.tables.orders
    days = transaction.days
    rows = raw_rows.scope(transaction.settings)
    others = raw_rows.scope(transaction.settings)
    on_days = raw_rows.on_days(rows, days)
    named_by_rows = sa.select(rows.c.shop_id, rows.c.trimmed_order_id.label("order_id")).where(on_days, rows.c.shop_id.is_not(None))
    named_by_orders = sa.select(orders.c.shop_id, orders.c.order_id).where(days.includes(orders.c.order_date))
    named = named_by_rows.union(named_by_orders).subquery("named")
    of_days = sa.select(*raw_rows.frame_columns(rows)).where(on_days)
    of_orders = (
        sa.select(*raw_rows.frame_columns(others))
        .join(named, sa.and_(named.c.shop_id == others.c.shop_id, named.c.order_id == others.c.trimmed_order_id))
        .where(sa.not_(days.includes(others.c.day)))
    )
    both = of_days.union_all(of_orders).subquery("versions")
    return sa.select(*both.c)


def transform(judged: pl.DataFrame, type_mappings: pl.DataFrame, days: DayRange) -> TransformedOrders:
    """选出每个订单的赢家并换算成 orders 的列。

    输入一行一条评判过的原始记录，输出一行一个订单；没有有效版本的订单不出现。
    """
    own_day = pl.col("day").is_between(days.first, days.last)
    rejected = judged.filter(own_day & pl.col("rule").is_not_null()).select("raw_id", "import_id", "day", "rule")
    winners = (
        judged.filter(pl.col("rule").is_null())
        .sort("import_rank", "raw_id")
        .unique(["shop_id", "order_id"], keep="last", maintain_order=True)
    )
    known_types = type_mappings.filter(pl.col("system_order_type").is_in(SYSTEM_ORDER_TYPES))
    orders = winners.join(known_types, left_on="order_type", right_on="raw_order_type", how="left").select(
        "shop_id",
        "order_id",
        pl.col("customer_name").alias("customer_nickname"),
        pl.col("order_status").fill_null("unknown").alias("latest_status"),
        pl.col("order_type").alias("raw_order_type"),
        pl.col("system_order_type").fill_null("BULK"),
        pl.col("amount").fill_null(0),
        pl.col("quantity").fill_null(1),
        "ordered_at",
        pl.col("day").alias("order_date"),
        "import_id",
        "raw_id",
    )
    return TransformedOrders(orders=orders, rejected=rejected)


def load(transaction: DataTransaction, result: TransformedOrders) -> WriteCounts:
    """写订单、删没有赢家的订单、更新客户索引与拒收记录。"""
    connection, target = transaction.connection, transaction.target
    orders = transaction.tables.orders
    staging = stage_frame(connection, result.orders, name="staged_orders", like=orders)
    gone = stage_gone_orders(transaction, staging)
    guard_deletes(transaction, gone)
    mark_changed_elsewhere(transaction, staging)
    written = upsert_staged(connection, staging, orders, ORDER_UPSERT)
    index_orders(connection, target, result.orders)
    unindex_orders(connection, target, gone)
    same_order = sa.and_(orders.c.shop_id == gone.c.shop_id, orders.c.order_id == gone.c.order_id)
    deleted = connection.execute(sa.delete(orders).where(same_order)).rowcount
    own_days = transaction.days.includes(rejected_rows.c.day)
    raw_rows.write_rejected(connection, target, result.rejected, own_days)
    return written + WriteCounts(rows=result.orders.height, deleted=deleted)


def stage_gone_orders(transaction: DataTransaction, staging: sa.Table) -> sa.Table:
    """临时表：orders 里在这些天、却没有赢家的订单。"""
    orders = transaction.tables.orders
    gone = sa.Table(
        "gone_orders",
        sa.MetaData(),
        *[sa.Column(name, orders.c[name].type) for name in ("shop_id", "order_id", "order_date")],
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    gone.create(transaction.connection)
    has_winner = sa.select(staging.c.order_id).where(staging.c.shop_id == orders.c.shop_id, staging.c.order_id == orders.c.order_id)
    without_winner = sa.select(orders.c.shop_id, orders.c.order_id, orders.c.order_date).where(
        transaction.days.includes(orders.c.order_date), ~has_winner.exists()
    )
    transaction.connection.execute(sa.insert(gone).from_select(["shop_id", "order_id", "order_date"], without_winner))
    return gone


def guard_deletes(transaction: DataTransaction, gone: sa.Table) -> None:
    """要删的太多就停下：多半是 shop_configs 里的店铺改了名，不该抹掉它的历史。"""
    if transaction.run.allow_deletes:
        return
    connection, days = transaction.connection, transaction.days
    orders = transaction.tables.orders
    guarded = sa.not_(gone.c.order_date.in_(days_allowing_deletes(transaction.target, days)))
    deletes = connection.execute(sa.select(sa.func.count()).select_from(gone).where(guarded)).scalar_one()
    if deletes <= ALWAYS_ALLOWED_DELETES:
        return
    total = connection.execute(sa.select(sa.func.count()).select_from(orders).where(days.includes(orders.c.order_date))).scalar_one()
    if deletes > total * transaction.settings.max_delete_share:
        raise TooManyDeletesError(deletes=deletes, orders=total, first_day=str(days.first), last_day=str(days.last))


def mark_changed_elsewhere(transaction: DataTransaction, staging: sa.Table) -> None:
    """有变化、而赢家在区间之外的订单：下游只会在这个区间里找客户，所以给它们的客户记陈旧。"""
    orders = transaction.tables.orders
    changed = sa.or_(
        *[orders.c[name].is_distinct_from(staging.c[name]) for name in ("latest_status", "system_order_type", "amount", "ordered_at")]
    )
    outside = sa.not_(transaction.days.includes(staging.c.order_date))
    same_order = sa.and_(orders.c.shop_id == staging.c.shop_id, orders.c.order_id == staging.c.order_id)
    same_index = sa.and_(order_index.c.shop_id == staging.c.shop_id, order_index.c.order_id == staging.c.order_id)
    keys = (
        sa.select(order_index.c.customer_key)
        .select_from(staging)
        .join(orders, same_order)
        .join(order_index, same_index)
        .where(order_index.c.target == transaction.target, outside, changed)
    )
    mark_stale(transaction.connection, transaction.target, keys)
