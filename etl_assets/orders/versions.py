"""手头订单的版本：读出、换算、暂存，只留赢家；整天做的边读边暂存，只做变了的只暂存赢家。"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, bound
from etl_assets.core.database_sync import execute_together, note_staged
from etl_assets.core.etl_tables import order_index
from etl_assets.core.tables import order_id_key, own_columns, raw_orders, shop_configs, trimmed
from etl_assets.ledger.marking import Scope
from etl_assets.orders.changed import ChangedOrders
from etl_assets.orders.transform import References, TransformedRows, reject_unindexable, transform
from etl_assets.orders.winners import find_superseded, won_outside
from etl_assets.services import raw_rows
from etl_assets.services.accounting import count_raw_rows
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.materialization import DataTransaction
from etl_assets.services.order_index import same_order
from etl_assets.services.vectorized_queries import (
    analysis,
    copy_into,
    create_staging,
    read_frame,
    reading_ahead,
    stage_columns,
    take_staging,
)

VERSIONS = "staged_orders"


@dataclass
class StagedVersions:
    """暂存在 `table` 的有效版本，一行一条；Polars 这边只留下选赢家要的列，与它的客户在不在份额之内。

    unmapped 一行一个类型没有映射的版本：raw_id、order_date、raw_order_type。
    """

    transaction: DataTransaction
    source: sa.Connection
    references: References
    table: sa.Table
    parts: list[pl.DataFrame] = field(default_factory=list)
    unmapped: list[pl.DataFrame] = field(default_factory=list)
    rejected: list[pl.DataFrame] = field(default_factory=list)

    def stage(self, statement: sa.Select[tuple[object, ...]]) -> None:
        """读、换算、暂存：一边在 `source` 上读着下一批，一边把这一批 COPY 进事务。"""
        connection, days = self.transaction.connection, self.transaction.days
        with reading_ahead(self.source, statement, bound(days)) as batches:
            for batch in batches:
                if not batch.is_empty() or not self.parts:  # 订单多半没有别的版本
                    self._add(reject_unindexable(connection, transform(batch, self.references, days), days))

    def _add(self, rows: TransformedRows) -> None:
        copy_into(self.transaction.connection, rows.versions.drop("is_unmapped"), self.table)
        in_share = self.transaction.share.covers().alias("in_share")
        of_import = pl.col("import_id").cast(pl.Categorical)  # 许多行共用几个
        self.parts.append(rows.versions.select("shop_id", "order_id", of_import, "raw_id", "order_date", in_share))
        self.unmapped.append(rows.versions.filter("is_unmapped").select("raw_id", "order_date", "raw_order_type"))
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
    superseded 一行一个输掉的有效版本，outside 一行一个赢家在份额之外的订单的；aside 暂存表里是 superseded 的那些。
    unmapped 一行一个类型没有映射的赢家；shops 是评判所用的店铺。raw 见 `count_raw_rows`。
    changed 是只做变了的，没有要删的、份额之外的，账接着算；整天做的是 None，whole_because 说为什么。
    """

    winners: sa.Table
    count: int
    rejected: pl.DataFrame
    superseded: pl.DataFrame
    shops: pl.DataFrame
    unmapped: pl.DataFrame = field(default_factory=pl.DataFrame)
    gone: pl.DataFrame = field(default_factory=pl.DataFrame)
    outside: pl.DataFrame = field(default_factory=pl.DataFrame)
    raw: pl.DataFrame = field(default_factory=pl.DataFrame)
    aside: sa.Table | None = None
    changed: ChangedOrders | None = None
    whole_because: str | None = None

    @property
    def scope(self) -> Scope:
        return "whole" if self.changed is None else "changed"


class MoreDaysNeededError(Exception):
    """手头订单的版本或行落在没锁的日子。"""

    def __init__(self, days: frozenset[date]) -> None:
        self.days = days


def stage_changed_orders(
    transaction: DataTransaction,
    source: sa.Connection,
    changed: ChangedOrders,
    references: References,
    locked: frozenset[date],
) -> StagedOrders:
    """等着的导入点名的订单：只暂存赢家。每个都有一个有效版本，所以没有要删的。"""
    assert_locked(changed.days_of_rows(), locked)
    candidates = rank_contested(source, changed.rows.versions.with_columns(pl.col("import_id").cast(pl.Categorical)))
    superseded = find_superseded(candidates)
    winners = changed.rows.versions.join(superseded, on="raw_id", how="anti")
    rows = winners.drop("is_unmapped")
    staging = stage_columns(transaction.connection, rows, name=VERSIONS, columns=version_columns(transaction))
    return StagedOrders(
        winners=staging,
        count=winners.height,
        rejected=changed.rows.rejected,
        superseded=superseded,
        shops=references.shops,
        changed=changed,
    )


def stage_whole_days(
    transaction: DataTransaction,
    source: sa.Connection,
    references: References,
    locked: frozenset[date],
    because: str,
) -> StagedOrders:
    """区间内的行一边读一边换算、暂存；然后按键去找同样那些订单在别的日子的版本。"""
    rows = raw_rows.scope(transaction.settings)
    staging = create_staging(transaction.connection, VERSIONS, version_columns(transaction))
    versions = StagedVersions(transaction, source, references, staging)
    versions.stage(rows_on_days(rows))
    missing = read_orders_without_version(transaction, staging)
    # 键放在读的连接上：在那里与快照里的 raw_orders 联接；再大也是一张表，IN 一万个元组会超出栈的深度
    at_hand = stage_keys(source, pl.concat([versions.keys(), missing.select("shop_id", "order_id")]), references.shops)
    versions.stage(rows_elsewhere(rows, at_hand))
    # 手头的订单此刻在 orders 里、而不在这个区间的日子
    of_rows = transaction.connection.scalars(_days_of_rows(transaction.tables.orders, staging), bound(transaction.days))
    assert_locked(versions.days().union(of_rows), locked)
    candidates = rank_contested(source, pl.concat(versions.parts))
    raw = count_raw_rows(source, transaction.settings, transaction.days)
    outside = candidates.clear() if transaction.share.is_whole else won_outside(candidates)
    losers = find_superseded(candidates)
    aside = set_superseded_aside(transaction.connection, staging, losers, outside)
    superseded = losers.join(outside, on="raw_id", how="anti")
    unmapped = (
        pl.concat(versions.unmapped).join(superseded, on="raw_id", how="anti").join(outside, on="raw_id", how="anti")
    )
    return StagedOrders(
        winners=staging,
        count=candidates.height - superseded.height - outside.height,
        gone=missing.join(versions.keys(), on=["shop_id", "order_id"], how="anti"),
        rejected=pl.concat(versions.rejected),
        superseded=superseded,
        aside=aside,
        outside=outside,
        unmapped=unmapped,
        raw=raw,
        shops=references.shops,
        whole_because=because,
    )


def assert_locked(days: set[date], locked: frozenset[date]) -> None:
    """:raises MoreDaysNeededError: 有没锁的。"""
    if elsewhere := frozenset(days - locked):
        raise MoreDaysNeededError(elsewhere)


@lru_cache(maxsize=8)
def rows_on_days(rows: sa.Subquery) -> sa.Select[tuple[object, ...]]:
    """区间内的全部行。"""
    return sa.select(*raw_rows.frame_columns(rows)).where(raw_rows.on_days(rows))


def stage_keys(source: sa.Connection, orders: pl.DataFrame, shops: pl.DataFrame) -> sa.Table:
    """临时表 orders_at_hand：手头订单的 (shop, order_id)，shop 是店名。"""
    keys = orders.join(shops, on="shop_id").select("shop", "order_id")
    columns = [sa.Column("shop", shop_configs.c.shop_name.type), sa.Column("order_id", raw_orders.c.order_id.type)]
    at_hand = stage_columns(source, keys, name="orders_at_hand", columns=columns)
    source.exec_driver_sql(analysis(source, at_hand))
    return at_hand


@lru_cache(maxsize=8)
def rows_elsewhere(rows: sa.Subquery, at_hand: sa.Table) -> sa.Select[tuple[object, ...]]:
    """手头订单在区间以外的版本；查找用的表达式与 raw_orders 的索引一致。"""
    is_at_hand = sa.tuple_(order_id_key(rows.c.order_id), trimmed(rows.c.shop)).in_(
        sa.select(at_hand.c.order_id, at_hand.c.shop)
    )
    return sa.select(*raw_rows.frame_columns(rows)).where(is_at_hand, raw_rows.off_days(rows))


def version_columns(transaction: DataTransaction) -> list[sa.Column[Any]]:
    """orders 的列，加上写索引要的 customer_key 与 target（缺省值，不必逐行传送）。"""
    orders = transaction.tables.orders
    columns = [sa.Column(column.name, column.type) for column in own_columns(orders)]
    customer = sa.Column("customer_key", order_index.c.customer_key.type)
    quoted = transaction.target.replace("'", "''")
    target = sa.Column("target", order_index.c.target.type, server_default=sa.text(f"'{quoted}'"))
    return [*columns, customer, target]


def read_orders_without_version(transaction: DataTransaction, versions: sa.Table) -> pl.DataFrame:
    """orders 里在这些天、暂存的版本里没有的订单，一行一个：版本在别的日子，或没有赢家。

    customer_key 是现有那一行的客户；没有名字的行也要归某个份额，名字算作空。
    """
    statement = _orders_without_version(transaction.tables.orders, versions)
    missing = read_frame(transaction.connection, statement, bound(transaction.days))
    return missing.with_columns(pl.col("customer_nickname").fill_null("")).with_columns(customer_key())


def rank_contested(source: sa.Connection, versions: pl.DataFrame) -> pl.DataFrame:
    """加 is_contested：订单有几个版本；与 import_rank：它们的导入之间的先后，一个这样的订单也没有的导入不必问，是 NULL。"""
    marked = versions.with_columns(is_contested=pl.struct("shop_id", "order_id").is_duplicated())
    contested = marked.filter("is_contested")["import_id"].unique()
    if contested.is_empty():
        return marked.with_columns(import_rank=pl.lit(None, pl.Int64))
    return marked.join(raw_rows.read_import_ranks(source, contested), on="import_id", how="left")


def set_superseded_aside(
    connection: sa.Connection, staging: sa.Table, losers: pl.DataFrame, outside: pl.DataFrame
) -> sa.Table | None:
    """输掉的版本从暂存表移进另一张，一次往返：暂存表里只留赢家，账照另一张数，不必再传一遍。份额之外的不算账，不留。"""
    if losers.is_empty():
        return None
    names = ("raw_id", "shop_id", "order_id", "order_date")
    aside, emptied = take_staging(
        connection, "superseded_versions", [sa.Column(name, staging.c[name].type) for name in names]
    )
    note_staged(connection, int(losers.estimated_size()))
    execute_together(
        connection,
        emptied,
        _set_aside(staging, aside),
        parameters={"losers": losers["raw_id"].to_list(), "outside": outside["raw_id"].to_list()},
    )
    return aside


@lru_cache(maxsize=64)
def _orders_without_version(orders: sa.Table, versions: sa.Table) -> sa.Select[Any]:
    versioned = sa.select(versions.c.order_id).where(same_order(versions, orders)).exists()
    return sa.select(orders.c.shop_id, orders.c.order_id, orders.c.customer_nickname, orders.c.order_date).where(
        orders.c.order_date.between(FIRST_DAY, LAST_DAY), ~versioned
    )


@lru_cache(maxsize=64)
def _days_of_rows(orders: sa.Table, versions: sa.Table) -> sa.Select[tuple[date]]:
    days = sa.select(orders.c.order_date.distinct()).join(versions, same_order(versions, orders))
    return days.where(sa.not_(orders.c.order_date.between(FIRST_DAY, LAST_DAY)))


@lru_cache(maxsize=64)
def _set_aside(staging: sa.Table, aside: sa.Table) -> sa.Insert:
    losers, outside = (array(name, sa.BigInteger) for name in ("losers", "outside"))
    moved = (
        sa.delete(staging)
        .where(staging.c.raw_id == sa.any_(losers))
        .returning(*staging.c[*aside.c.keys()])
        .cte("moved")
    )
    return sa.insert(aside).from_select(
        aside.c.keys(), sa.select(moved).where(sa.not_(moved.c.raw_id == sa.any_(outside)))
    )
