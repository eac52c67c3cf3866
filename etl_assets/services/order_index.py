"""订单 → 客户的索引：与订单同一事务写下，找一个客户的订单不用扫全表；订单离开的客户在这里记为陈旧。"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import TargetTables, order_index, stale_customers
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.locks import lock_days
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import (
    analyze_staging,
    copy_into,
    create_staging,
    read_frame,
    reading_ahead,
    release_staging,
    stage_frame,
)

CUSTOMER_ASSETS = ("customers", "leads")
"""按客户计算的资产：各有自己的陈旧标记。"""


INDEXED = ("customer_nickname", "customer_key", "order_date")
"""一个订单在索引里记着的。"""


def index_orders(connection: sa.Connection, target: str, orders: sa.Table) -> None:
    """更新这些订单的索引；换了客户的给旧客户记陈旧。

    索引只有自己写，同一个订单又总有锁隔开，所以不用 ON CONFLICT：它给每行都多一次查找与一条 WAL。

    :param orders: 暂存表，一行一个订单：target、shop_id、order_id、customer_nickname、customer_key、order_date。
    """
    connection.execute(_index_statement(target, orders))


@lru_cache(maxsize=64)
def _index_statement(target: str, orders: sa.Table) -> sa.Insert:
    """暂存表的定义是缓存着的同一个，语句也就只拼一次。"""
    same_row = sa.and_(_same_order(orders), order_index.c.target == orders.c.target)
    differs = sa.or_(*[order_index.c[name].is_distinct_from(orders.c[name]) for name in INDEXED])
    changed = (
        sa.select(*orders.c["target", "shop_id", "order_id", *INDEXED], order_index.c.customer_key.label("old_key"))
        .join(order_index, same_row)
        .where(differs)
        .cte("changed")
    )
    left = sa.select(changed.c.old_key).where(changed.c.old_key != changed.c.customer_key)
    marked = insert_marks(target, left).cte("marked")
    updated = (
        sa.update(order_index)
        .where(_same_order(changed), order_index.c.target == changed.c.target)
        .values({name: changed.c[name] for name in INDEXED})
        .cte("updated")
    )
    key = ("shop_id", "order_id", "target")
    added = (
        sa.select(*orders.c[*key, *INDEXED]).where(~sa.select(order_index.c.order_id).where(same_row).exists()).order_by(*orders.c[*key])
    )
    return sa.insert(order_index).from_select([*key, *INDEXED], added).add_cte(changed, marked, updated)


def unindex_orders(connection: sa.Connection, target: str, gone: sa.Table) -> None:
    """这些订单（shop_id、order_id）没有了：给它们的客户记陈旧，删去索引。"""
    theirs = sa.and_(_same_order(gone), order_index.c.target == target)
    mark_stale(connection, target, sa.select(order_index.c.customer_key).join(gone, theirs))
    connection.execute(sa.delete(order_index).where(theirs))


def mark_stale(connection: sa.Connection, target: str, customer_keys: sa.Select[tuple[str]]) -> None:
    """给每个按客户计算的资产各记一个标记；标记只增不改，谁修好谁删。"""
    connection.execute(insert_marks(target, customer_keys))


def insert_marks(target: str, customer_keys: sa.Select[tuple[str]]) -> sa.Insert:
    """语句：给每个按客户计算的资产各记一个标记。"""
    keys = customer_keys.distinct().subquery("keys")
    # 不用 VALUES：带着它的语句 SQLAlchemy 每次都重新编译
    assets = sa.func.unnest(sa.cast(list(CUSTOMER_ASSETS), sa.ARRAY(sa.Text))).table_valued("asset", name="assets").render_derived()
    (key,) = keys.c
    marks = sa.select(sa.literal(target), assets.c.asset, key).select_from(keys).join(assets, sa.true())
    return sa.insert(stale_customers).from_select(["target", "asset", "customer_key"], marks)


def stage_customers(connection: sa.Connection, tables: TargetTables, asset: str, days: DayRange, share: Share) -> tuple[sa.Table, int]:
    """临时表 customers_at_hand 与其行数：份额之内、这些天有订单的客户，加上该资产全部陈旧的客户；position 从 0 起给他们编号。"""
    at_hand = create_staging(connection, "customers_at_hand", [sa.Column("customer_key", sa.Text), sa.Column("position", sa.Integer)])
    insert = _insert_customers(at_hand, tables, asset, share)
    count = connection.execute(insert, {"first": days.first, "last": days.last}, execution_options={"preserve_rowcount": True}).rowcount
    analyze_staging(connection, at_hand)
    return at_hand, count


def read_marks(connection: sa.Connection, target: str, asset: str, at_hand: sa.Table) -> Sequence[int]:
    """手头客户此刻的标记；锁住客户之后、读订单之前读，所以只消掉确实修好的。"""
    return connection.scalars(_marks(target, asset, at_hand)).all()


def consume_marks(connection: sa.Connection, tables: TargetTables, mark_ids: Sequence[int]) -> None:
    """删去修好的标记；事务失败则标记还在。

    没有订单却因为有人碰过商机而留下的客户，标记也留下：人收回以后，哪一天的运行都该让他走。
    """
    connection.execute(_delete_marks(tables), {"mark_ids": list(mark_ids)})


def adopt_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> int:
    """把别的 ETL 写进 orders 的行收进索引（这些天的、索引里没有或不符的）；返回收进的行数。

    份额之外的订单归别的 ETL，索引里记的是我们算出的赢家，不随它的行变。
    """
    if _foreign_orders(connection, tables, days, share).is_empty() and not _vanished_orders(connection, tables, days, share, limit=1):
        return 0
    lock_days(connection, tables.schema, days)  # 自己的 orders 运行可能正在写这些行：锁住再看一次
    foreign = _foreign_orders(connection, tables, days, share)
    named = foreign.select(pl.lit(tables.schema).alias("target"), *foreign.columns)
    staging = stage_frame(connection, named, name="foreign_orders", like=order_index)
    index_orders(connection, tables.schema, staging)
    release_staging(connection, staging)
    vanished = _vanished_orders(connection, tables, days, share)
    gone = stage_frame(
        connection,
        pl.DataFrame(vanished, schema={"shop_id": pl.String, "order_id": pl.String}, orient="row"),
        name="vanished_orders",
        like=order_index,
    )
    unindex_orders(connection, tables.schema, gone)
    release_staging(connection, gone)
    return foreign.height + len(vanished)


def adopt_all_orders(engine: sa.Engine, tables: TargetTables) -> int:
    """把 orders 里索引还没有的行全收进来，不论份额；返回行数。

    接手旧系统的结果之前做：索引不全，一个客户的订单就读不全，他的商机会被当成没有订单的删掉，再以新的编号建起来。
    """
    orders = tables.orders
    indexed = sa.select(order_index.c.order_id).where(_same_order(orders), order_index.c.target == tables.schema)
    unindexed = sa.select(orders.c.shop_id, orders.c.order_id, orders.c.customer_nickname, orders.c.order_date).where(
        orders.c.customer_nickname.is_not(None), ~indexed.exists()
    )
    names = ("shop_id", "order_id", "customer_nickname", "order_date", "customer_key")
    with engine.connect() as source, engine.begin() as connection, reading_ahead(source, unindexed) as batches:
        staging = create_staging(connection, "adopted_orders", [sa.Column(name, order_index.c[name].type) for name in names])
        for batch in batches:
            copy_into(connection, batch.with_columns(customer_key()).select(names), staging)
        insert = pg.insert(order_index).from_select(["target", *names], sa.select(sa.literal(tables.schema), *staging.c[names]))
        # 有冲突，就是正有运行写同一个订单，它知道得更新
        return connection.execute(insert.on_conflict_do_nothing(), execution_options={"preserve_rowcount": True}).rowcount


def _same_order(other: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(order_index.c.shop_id == other.c.shop_id, order_index.c.order_id == other.c.order_id)


def _foreign_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> pl.DataFrame:
    """一行一个订单。索引里有的，看它的客户在不在份额之内；没有的，看 orders 里的名字。"""
    orders = tables.orders
    indexed = sa.and_(_same_order(orders), order_index.c.target == tables.schema)
    foreign = read_frame(
        connection,
        sa.select(
            orders.c.shop_id,
            orders.c.order_id,
            orders.c.customer_nickname,
            orders.c.order_date,
            order_index.c.customer_key.is_not(None).label("is_indexed"),
        )
        .outerjoin(order_index, indexed)
        .where(
            days.includes(orders.c.order_date),
            orders.c.customer_nickname.is_not(None),
            sa.or_(
                order_index.c.order_id.is_(None),
                sa.and_(
                    share.covers_key(order_index.c.customer_key),
                    sa.or_(
                        order_index.c.customer_nickname.is_distinct_from(orders.c.customer_nickname),
                        order_index.c.order_date.is_distinct_from(orders.c.order_date),
                    ),
                ),
            ),
        ),
    )
    return foreign.with_columns(customer_key()).filter(pl.col("is_indexed") | share.covers()).drop("is_indexed")


def _vanished_orders(
    connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share, limit: int | None = None
) -> list[tuple[str, str]]:
    existing = sa.select(tables.orders.c.order_id).where(_same_order(tables.orders)).exists()
    rows = connection.execute(
        sa.select(order_index.c.shop_id, order_index.c.order_id)
        .where(order_index.c.target == tables.schema, days.includes(order_index.c.order_date), share.covers_key(order_index.c.customer_key))
        .where(~existing)
        .limit(limit)
    )
    return [(str(shop_id), order_id) for shop_id, order_id in rows]


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=64)
def _insert_customers(at_hand: sa.Table, tables: TargetTables, asset: str, share: Share) -> sa.Insert:
    orders, target = tables.orders, tables.schema
    first, last = (sa.bindparam(name, type_=sa.Date) for name in ("first", "last"))
    on_days = (
        sa.select(order_index.c.customer_key)
        .join(orders, _same_order(orders))
        .where(order_index.c.target == target, orders.c.order_date.between(first, last))
    )
    stale = sa.select(stale_customers.c.customer_key).where(stale_customers.c.target == target, stale_customers.c.asset == asset)
    of_share = [keys.where(share.covers_key(keys.selected_columns[0])) for keys in (on_days, stale)]
    keys = sa.union(*of_share).subquery("keys")
    numbered = sa.select(keys.c.customer_key, sa.func.row_number().over() - 1)
    return sa.insert(at_hand).from_select(["customer_key", "position"], numbered)


@lru_cache(maxsize=64)
def _marks(target: str, asset: str, at_hand: sa.Table) -> sa.Select[tuple[int]]:
    return (
        sa.select(stale_customers.c.mark_id)
        .join(at_hand, at_hand.c.customer_key == stale_customers.c.customer_key)
        .where(stale_customers.c.target == target, stale_customers.c.asset == asset)
    )


@lru_cache(maxsize=64)
def _delete_marks(tables: TargetTables) -> sa.Delete:
    ids = sa.bindparam("mark_ids", type_=sa.ARRAY(sa.BigInteger))
    key, target = stale_customers.c.customer_key, stale_customers.c.target
    has_orders = sa.select(order_index.c.order_id).where(order_index.c.customer_key == key, order_index.c.target == target).exists()
    remains = sa.select(tables.customers.c.customer_key).where(tables.customers.c.customer_key == key).exists()
    return sa.delete(stale_customers).where(stale_customers.c.mark_id == sa.any_(ids), sa.or_(has_orders, ~remains))
