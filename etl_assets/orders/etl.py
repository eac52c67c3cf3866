"""订单 ETL：读出手头订单的全部版本，选出赢家，整批写入。规则见 DOMAIN 第 3 节。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound
from etl_assets.core.errors import TooManyDeletesError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import order_id_key, order_index, order_type_mappings, raw_orders, rejected_rows, shop_configs, trimmed
from etl_assets.services import raw_rows
from etl_assets.services.accounting import count_raw_rows, verify_days
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.ledger import Revisions, days_allowing_deletes
from etl_assets.services.locks import lock_days
from etl_assets.services.materialization import AssetReport, DataTransaction, RunContext, data_transaction, retry_conflicts
from etl_assets.services.order_index import INDEXED, index_orders, insert_marks, unindex_orders
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import (
    Upsert,
    WriteCounts,
    analyze_staging,
    copy_into,
    create_staging,
    read_frame,
    reading_ahead,
    release_staging,
    stage_frame,
    upsert_staged,
)

SYSTEM_ORDER_TYPES = ("SAMPLE", "PROOF", "BULK")
ALWAYS_ALLOWED_DELETES = 20
LONGEST_INDEXED_BYTES = 2_600
"""PostgreSQL 的 B 树一项最多 2,704 字节。"""

_TYPE_MAPPINGS = sa.select(order_type_mappings.c.raw_order_type, order_type_mappings.c.system_order_type).where(
    order_type_mappings.c.system_order_type == sa.any_(sa.cast(list(SYSTEM_ORDER_TYPES), sa.ARRAY(sa.Text)))
)
ORDER_UPSERT = Upsert(key=("shop_id", "order_id"), touch="updated_at")


@dataclass(frozen=True)
class References:
    """评判与换算一行所需的小表。"""

    imports: pl.DataFrame
    shops: pl.DataFrame
    type_mappings: pl.DataFrame


@dataclass(frozen=True)
class TransformedRows:
    """versions：一行一条有效的原始记录，orders 的列加 import_rank 与 customer_key。rejected：一行一条被拒收的。"""

    versions: pl.DataFrame
    rejected: pl.DataFrame


@dataclass
class StagedVersions:
    """暂存在 `table` 的有效版本，一行一条；Polars 这边只留下选赢家要的列，与它的客户在不在份额之内。"""

    table: sa.Table
    share: Share
    parts: list[pl.DataFrame] = field(default_factory=list)
    rejected: list[pl.DataFrame] = field(default_factory=list)

    def add(self, connection: sa.Connection, rows: TransformedRows) -> None:
        copy_into(connection, rows.versions.drop("import_rank"), self.table)
        in_share = self.share.covers().alias("in_share")
        self.parts.append(rows.versions.select("shop_id", "order_id", "import_rank", "raw_id", "order_date", in_share))
        self.rejected.append(rows.rejected)

    def keys(self) -> pl.DataFrame:
        """一行一个订单：shop_id、order_id。"""
        return pl.concat(self.parts).select("shop_id", "order_id").unique()

    def days(self) -> set[date]:
        return set(pl.concat([part["order_date"].unique() for part in self.parts]))


@dataclass(frozen=True)
class StagedOrders:
    """手头的订单：winners 暂存表一行一个赢家，其中 count 个在份额之内。

    gone 一行一个没有赢家的订单（shop_id、order_id、order_date 与现有那一行的 customer_nickname、customer_key）。
    superseded 一行一个输掉的版本；outside 一行一个版本，它的订单的赢家在份额之外；raw_counts 是区间内每天的原始行数。
    """

    winners: sa.Table
    count: int
    gone: pl.DataFrame
    rejected: pl.DataFrame
    superseded: pl.DataFrame
    outside: pl.DataFrame
    raw_counts: Mapping[date, int]
    revisions: Revisions


@retry_conflicts
def materialize_orders(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让这些天有有效版本、或在 orders 里有行的每个订单都正确。

    :raises TooManyDeletesError: 要删的订单太多而没人允许；什么也没写。
    :raises AccountingError: 写完一数，有行不知去向；什么也没写。
    """
    with data_transaction(engine, settings, asset="orders", days=days, run=run) as transaction:
        staged = extract(engine, transaction)
        written = load(transaction, staged)
        accounts = verify_days(
            transaction.connection,
            settings,
            days,
            share=transaction.share,
            raw=staged.raw_counts,
            superseded=staged.superseded,
            outside=staged.outside,
        )
        report = transaction.complete(staged.revisions, written=written, rejected=staged.rejected.height)
        return replace(report, accounts=accounts)


def extract(engine: sa.Engine, transaction: DataTransaction) -> StagedOrders:
    """锁住手头订单所有版本的业务日，与它们在 orders 里此刻的业务日，再读、换算、暂存它们。

    锁了才读；读出的若落在没锁的日子，就放开重锁：否则一个较旧的快照可能盖过较新的，或正被别的运行挪走、删去。
    """
    connection = transaction.connection
    locked = set(transaction.days)
    while True:
        savepoint = connection.begin_nested()
        lock_days(connection, transaction.target, locked)
        revisions = transaction.read_revisions()
        with open_snapshot(engine) as source:
            versions, missing = stage_versions(transaction, source)
            raw_counts = count_raw_rows(source, transaction.settings, transaction.days)
        elsewhere = (versions.days() | read_days_of_rows(transaction, versions.table)) - locked
        if not elsewhere:
            break
        savepoint.rollback()
        release_staging(connection, versions.table)
        locked |= elsewhere
    candidates = pl.concat(versions.parts)
    outside = candidates.clear() if transaction.share.is_whole else won_outside(candidates)
    superseded = drop_superseded(connection, versions.table, candidates).join(outside, on="raw_id", how="anti")
    return StagedOrders(
        winners=versions.table,
        count=candidates.height - superseded.height - outside.height,
        gone=missing.join(versions.keys(), on=["shop_id", "order_id"], how="anti"),
        rejected=pl.concat(versions.rejected),
        superseded=superseded,
        outside=outside,
        raw_counts=raw_counts,
        revisions=revisions,
    )


@contextmanager
def open_snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """另一个连接，整段读取是同一个快照；锁在写的连接上，所以在锁住之后打开。"""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        yield connection


def stage_versions(transaction: DataTransaction, source: sa.Connection) -> tuple[StagedVersions, pl.DataFrame]:
    """暂存手头订单的有效版本；也返回 orders 里在这些天、而这些天没有有效版本的订单。

    区间内的行一边读一边换算、暂存；然后按键去找同样那些订单在别的日子的版本。
    """
    references = read_references(source)
    versions = StagedVersions(create_version_staging(transaction), transaction.share)
    rows = raw_rows.scope(transaction.settings)
    stage_rows(transaction, source, rows_on_days(rows), references, versions)
    missing = read_orders_without_version(transaction, versions.table)
    at_hand = stage_keys(source, pl.concat([versions.keys(), missing.select("shop_id", "order_id")]), references.shops)
    stage_rows(transaction, source, rows_elsewhere(rows, at_hand), references, versions)
    return versions, missing


def stage_rows(
    transaction: DataTransaction,
    source: sa.Connection,
    statement: sa.Select[tuple[object, ...]],
    references: References,
    versions: StagedVersions,
) -> None:
    """读、换算、暂存：一边在 `source` 上读着下一批，一边把这一批 COPY 进事务。"""
    with reading_ahead(source, statement, bound(transaction.days), while_waiting=transaction.keep_alive) as batches:
        for batch in batches:
            if batch.is_empty() and versions.parts:  # 订单多半没有别的版本
                continue
            rows = transform(batch, references, transaction.days)
            versions.add(transaction.connection, reject_unindexable(transaction, rows))


def read_references(source: sa.Connection) -> References:
    return References(
        imports=raw_rows.read_imports(source), shops=raw_rows.read_shops(source), type_mappings=read_frame(source, _TYPE_MAPPINGS)
    )


@lru_cache(maxsize=8)
def rows_on_days(rows: sa.Subquery) -> sa.Select[tuple[object, ...]]:
    """区间内的全部行。"""
    return sa.select(rows.c.import_no, *raw_rows.frame_columns(rows)).where(raw_rows.on_days(rows))


def stage_keys(source: sa.Connection, orders: pl.DataFrame, shops: pl.DataFrame) -> sa.Table:
    """临时表 orders_at_hand：手头订单的 (shop, order_id)，shop 是店名。"""
    keys = orders.join(shops, on="shop_id").select("shop", "order_id")
    columns = [sa.Column("shop", shop_configs.c.shop_name.type), sa.Column("order_id", raw_orders.c.order_id.type)]
    at_hand = create_staging(source, "orders_at_hand", columns)
    copy_into(source, keys, at_hand)
    analyze_staging(source, at_hand)
    return at_hand


@lru_cache(maxsize=8)
def rows_elsewhere(rows: sa.Subquery, at_hand: sa.Table) -> sa.Select[tuple[object, ...]]:
    """手头订单在区间以外的版本；查找用的表达式与 raw_orders 的索引一致。"""
    is_at_hand = sa.tuple_(order_id_key(rows.c.order_id), trimmed(rows.c.shop)).in_(sa.select(at_hand.c.order_id, at_hand.c.shop))
    return sa.select(rows.c.import_no, *raw_rows.frame_columns(rows)).where(is_at_hand, raw_rows.off_days(rows))


def transform(rows: pl.DataFrame, references: References, days: DayRange) -> TransformedRows:
    """评判，并把有效的行换算成 orders 的列。

    输入一行一条原始记录，输出的两帧合起来也是；区间以外被拒收的行不在其中，它们归自己的日子。
    """
    judged = raw_rows.judge(rows, references.shops).join(references.imports, on="import_no", how="left")
    own_day = pl.col("day").is_between(days.first, days.last)
    rejected = judged.filter(own_day & pl.col("rule").is_not_null()).select("raw_id", "import_id", "day", "rule")
    valid = judged.filter(pl.col("rule").is_null())
    versions = valid.join(references.type_mappings, left_on="order_type", right_on="raw_order_type", how="left").select(
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
        "import_rank",
    )
    return TransformedRows(versions=versions.with_columns(customer_key()), rejected=rejected)


def reject_unindexable(transaction: DataTransaction, rows: TransformedRows) -> TransformedRows:
    """NFKC 能把一个字变成十几个：customer_key 长到 customers 的唯一索引放不下的行，按 text_too_long 拒收。

    放不放得下要看压缩之后的大小，只有服务器知道；这样的行几乎没有，有才去问。
    """
    long = rows.versions.filter(pl.col("customer_key").str.len_bytes() > LONGEST_INDEXED_BYTES)
    if long.is_empty():
        return rows
    connection = transaction.connection
    columns: list[sa.Column[Any]] = [sa.Column("raw_id", sa.BigInteger), sa.Column("customer_key", sa.Text)]
    staging = create_staging(connection, "long_keys", columns)
    copy_into(connection, long.select("raw_id", "customer_key"), staging)
    stored_bytes = sa.func.pg_column_size(staging.c.customer_key)
    unindexable = read_frame(connection, sa.select(staging.c.raw_id).where(stored_bytes > LONGEST_INDEXED_BYTES))
    release_staging(connection, staging)
    refused = rows.versions.join(unindexable, on="raw_id", how="semi").filter(
        pl.col("order_date").is_between(transaction.days.first, transaction.days.last)
    )
    rejected = refused.select("raw_id", "import_id", pl.col("order_date").alias("day"), pl.lit("text_too_long").alias("rule"))
    return TransformedRows(versions=rows.versions.join(unindexable, on="raw_id", how="anti"), rejected=pl.concat([rows.rejected, rejected]))


def create_version_staging(transaction: DataTransaction) -> sa.Table:
    """orders 的列，加上写索引要的 customer_key 与 target（缺省值，不必逐行传送）。"""
    orders = transaction.tables.orders
    columns = [sa.Column(column.name, column.type) for column in orders.columns if column.name not in ("created_at", "updated_at")]
    customer = sa.Column("customer_key", order_index.c.customer_key.type)
    quoted = transaction.target.replace("'", "''")
    target = sa.Column("target", order_index.c.target.type, server_default=sa.text(f"'{quoted}'"))
    return create_staging(transaction.connection, "staged_orders", [*columns, customer, target])


def drop_superseded(connection: sa.Connection, staging: sa.Table, candidates: pl.DataFrame) -> pl.DataFrame:
    """暂存表里只留赢家；返回输掉的版本。"""
    contested = candidates.filter(pl.struct("shop_id", "order_id").is_duplicated())
    if contested.is_empty():
        return contested
    superseded = contested.join(pick_winners(contested), on="raw_id", how="anti")
    losers = sa.cast(superseded["raw_id"].to_list(), sa.ARRAY(sa.BigInteger))
    connection.execute(sa.delete(staging).where(staging.c.raw_id == sa.any_(losers)))
    return superseded


def pick_winners(versions: pl.DataFrame) -> pl.DataFrame:
    """每个订单最新的版本：导入的名次最高，同名次比 raw_id。输入一行一个有效版本，输出一行一个订单。"""
    return versions.sort("import_rank", "raw_id").unique(["shop_id", "order_id"], keep="last")


def won_outside(versions: pl.DataFrame) -> pl.DataFrame:
    """赢家在份额之外的订单的全部版本；一行一个有效版本。"""
    return versions.join(pick_winners(versions).filter(~pl.col("in_share")), on=["shop_id", "order_id"], how="semi")


def read_orders_without_version(transaction: DataTransaction, versions: sa.Table) -> pl.DataFrame:
    """orders 里在这些天、暂存的版本里没有的订单，一行一个：版本在别的日子，或没有赢家。

    customer_key 是现有那一行的客户；没有名字的行也要归某个份额，名字算作空。
    """
    statement = _orders_without_version(transaction.tables.orders, versions)
    missing = read_frame(transaction.connection, statement, bound(transaction.days))
    return missing.with_columns(pl.col("customer_nickname").fill_null("")).with_columns(customer_key())


def read_days_of_rows(transaction: DataTransaction, versions: sa.Table) -> set[date]:
    """手头的订单此刻在 orders 里、而不在这个区间的日子。"""
    return set(transaction.connection.scalars(_days_of_rows(transaction.tables.orders, versions), bound(transaction.days)))


def load(transaction: DataTransaction, staged: StagedOrders) -> WriteCounts:
    """写订单、删没有赢家的订单、更新客户索引与拒收记录。"""
    connection, target = transaction.connection, transaction.target
    orders = transaction.tables.orders
    guard_deletes(transaction, staged.gone.filter(transaction.share.covers()))
    index_outside(transaction, staged.winners)
    changed = stage_changed(transaction, staged.winners)
    mark_changed_elsewhere(transaction, changed)
    written = upsert_staged(connection, changed, orders, ORDER_UPSERT)
    index_orders(connection, target, changed)
    deleted = delete_gone(transaction, staged.gone)
    own_days = transaction.days.includes(rejected_rows.c.day)
    raw_rows.write_rejected(connection, target, staged.rejected, own_days)
    return written + WriteCounts(rows=staged.count, deleted=deleted)


def index_outside(transaction: DataTransaction, winners: sa.Table) -> None:
    """赢家在份额之外的订单移出暂存表：orders 里不写也不删，只记进索引。

    索引记下它的赢家，它离开的客户才会重算；旧系统晚些改写那一行，也不会被当成份额之内的收进来。
    """
    if transaction.share.is_whole:
        return
    names = ("target", "shop_id", "order_id", "customer_nickname", "customer_key", "order_date")
    staging = create_staging(transaction.connection, "outside_orders", [sa.Column(name, order_index.c[name].type) for name in names])
    is_outside = sa.not_(transaction.share.covers_key(winners.c.customer_key))
    moved = sa.delete(winners).where(is_outside).returning(*winners.c[names]).cte("moved")
    transaction.connection.execute(sa.insert(staging).from_select(names, sa.select(*moved.c[names])))
    index_orders(transaction.connection, transaction.target, staging)


def stage_changed(transaction: DataTransaction, winners: sa.Table) -> sa.Table:
    """orders 或索引里还不是这样的赢家，另一张暂存表：原样重跑时只联接这一次，后面各条语句几乎无事可做。

    不从赢家里删去没变的：一百万行的 DELETE 比联接还久。这些天还没有订单时都是新的，不必再抄一遍。
    """
    connection, orders = transaction.connection, transaction.tables.orders
    if not connection.scalar(_has_orders(orders), bound(transaction.days)):
        return winners
    changed = create_staging(connection, "changed_orders", [sa.Column(column.name, column.type) for column in winners.columns])
    connection.execute(_insert_changed(orders, transaction.target, winners, changed))
    return changed


def delete_gone(transaction: DataTransaction, gone: pl.DataFrame) -> int:
    """删去没有赢家的订单；份额之外的只从索引里去掉。返回删去的行数。"""
    if gone.is_empty():
        return 0
    orders = transaction.tables.orders
    staging = stage_frame(transaction.connection, gone, name="gone_orders", like=order_index)
    unindex_orders(transaction.connection, transaction.target, staging)
    same_order = sa.and_(orders.c.shop_id == staging.c.shop_id, orders.c.order_id == staging.c.order_id)
    in_share = transaction.share.covers_key(staging.c.customer_key)
    return transaction.connection.execute(sa.delete(orders).where(same_order, in_share)).rowcount


def guard_deletes(transaction: DataTransaction, gone: pl.DataFrame) -> None:
    """要删的太多就停下：多半是 shop_configs 里的店铺改了名，不该抹掉它的历史。"""
    if transaction.run.allow_deletes or gone.height <= ALWAYS_ALLOWED_DELETES:
        return
    connection, days = transaction.connection, transaction.days
    orders = transaction.tables.orders
    allowed = connection.scalars(days_allowing_deletes(transaction.target, days)).all()
    deletes = gone.filter(~pl.col("order_date").is_in(list(allowed))).height
    if deletes <= ALWAYS_ALLOWED_DELETES:
        return
    existing = read_frame(connection, sa.select(orders.c.shop_id, orders.c.customer_nickname).where(days.includes(orders.c.order_date)))
    named = existing.with_columns(pl.col("customer_nickname").fill_null("")).select(customer_key())
    total = named.filter(transaction.share.covers()).height
    if deletes > total * transaction.settings.max_delete_share:
        raise TooManyDeletesError(deletes=deletes, orders=total, first_day=str(days.first), last_day=str(days.last))


def mark_changed_elsewhere(transaction: DataTransaction, winners: sa.Table) -> None:
    """有变化、而赢家在区间之外的订单：下游只会在这个区间里找客户，所以给它们的客户记陈旧。"""
    statement = _mark_changed_elsewhere(transaction.tables.orders, transaction.target, winners)
    transaction.connection.execute(statement, bound(transaction.days))


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=64)
def _orders_without_version(orders: sa.Table, versions: sa.Table) -> sa.Select[Any]:
    versioned = sa.select(versions.c.order_id).where(_same_order(versions, orders)).exists()
    return sa.select(orders.c.shop_id, orders.c.order_id, orders.c.customer_nickname, orders.c.order_date).where(
        orders.c.order_date.between(FIRST_DAY, LAST_DAY), ~versioned
    )


@lru_cache(maxsize=64)
def _days_of_rows(orders: sa.Table, versions: sa.Table) -> sa.Select[tuple[date]]:
    days = sa.select(orders.c.order_date.distinct()).join(versions, _same_order(versions, orders))
    return days.where(sa.not_(orders.c.order_date.between(FIRST_DAY, LAST_DAY)))


@lru_cache(maxsize=64)
def _has_orders(orders: sa.Table) -> sa.Select[tuple[bool]]:
    return sa.select(sa.select(orders.c.order_id).where(orders.c.order_date.between(FIRST_DAY, LAST_DAY)).exists())


@lru_cache(maxsize=64)
def _insert_changed(orders: sa.Table, target: str, winners: sa.Table, changed: sa.Table) -> sa.Insert:
    written = [column.name for column in winners.columns if column.name in orders.c and column.name not in ORDER_UPSERT.key]
    differs = [
        sa.tuple_(*table.c[*names]).is_distinct_from(sa.tuple_(*winners.c[*names]))
        for table, names in ((orders, written), (order_index, INDEXED))
    ]
    compared = (
        sa.select(*winners.c)
        .select_from(winners)
        .outerjoin(orders, _same_order(orders, winners))
        .outerjoin(order_index, sa.and_(_same_order(order_index, winners), order_index.c.target == target))
    )
    return sa.insert(changed).from_select([column.name for column in winners.columns], compared.where(sa.or_(*differs)))


@lru_cache(maxsize=64)
def _mark_changed_elsewhere(orders: sa.Table, target: str, winners: sa.Table) -> sa.Insert:
    changed = sa.or_(
        *[orders.c[name].is_distinct_from(winners.c[name]) for name in ("latest_status", "system_order_type", "amount", "ordered_at")]
    )
    outside = sa.not_(winners.c.order_date.between(FIRST_DAY, LAST_DAY))
    keys = (
        sa.select(order_index.c.customer_key)
        .select_from(winners)
        .join(orders, _same_order(winners, orders))
        .join(order_index, _same_order(winners, order_index))
        .where(order_index.c.target == target, outside, changed)
    )
    return insert_marks(target, keys)


def _same_order(left: sa.Table, right: sa.Table) -> sa.ColumnElement[bool]:
    return sa.and_(left.c.shop_id == right.c.shop_id, left.c.order_id == right.c.order_id)
