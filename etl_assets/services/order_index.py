"""订单 → 客户的索引：与订单同一事务写下，找一个客户的订单不用扫全表；订单离开的客户在这里记为陈旧。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import FIRST_DAY, DayRange, bound
from etl_assets.core.etl_tables import absent_assets, assets, order_index, stale_customers
from etl_assets.core.idle_transactions import kept_alive
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, customer_hash, target_tables
from etl_assets.ledger.graph import LINE
from etl_assets.ledger.locks import lock_days
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import (
    copy_into,
    create_staging,
    read_frame,
    reading_ahead,
    release_staging,
    stage_frame,
)

ANY_DAY = sa.cast(sa.null(), sa.Date)


INDEXED = ("customer_nickname", "customer_key", "order_date")
"""一个订单在索引里记着的。"""


def of_customer(customer_key: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """SQL 条件：索引里的这一行是这个客户的；按散列找，再比原文。

    原文写成函数来比：规划器会把两个等式当作互不相干，把一个客户的订单数估小几个数量级。
    """
    same = sa.func.texteq(order_index.c.customer_key, customer_key, type_=sa.Boolean())
    return sa.and_(customer_hash(order_index.c.customer_key) == customer_hash(customer_key), same)


def index_orders(connection: sa.Connection, target: str, orders: sa.Table, days: DayRange | None) -> None:
    """更新这些订单的索引；换了客户的给旧客户记陈旧，等做这些天的运行去修。

    索引只有自己写，同一个订单又总有锁隔开，所以不用 ON CONFLICT：它给每行都多一次查找与一条 WAL。

    :param orders: 暂存表，一行一个订单：target、shop_id、order_id、customer_nickname、customer_key、order_date。
    :param days: None 是随便哪一个运行去修。
    """
    connection.execute(index_statement(target, orders), _marked_on(days))


def _marked_on(days: DayRange | None) -> Mapping[str, Any]:
    return bound(days) if days else {FIRST_DAY.key: None}


@lru_cache(maxsize=64)
def index_statement(target: str, orders: sa.Table) -> sa.Insert:
    """`index_orders` 的语句，给要与别的一起发的。暂存表的定义是缓存着的同一个，语句也就只拼一次。"""
    same_row = sa.and_(same_order(orders), order_index.c.target == orders.c.target)
    differs = sa.or_(*[order_index.c[name].is_distinct_from(orders.c[name]) for name in INDEXED])
    changed = (
        sa.select(*orders.c["target", "shop_id", "order_id", *INDEXED], order_index.c.customer_key.label("old_key"))
        .join(order_index, same_row)
        .where(differs)
        .cte("changed")
    )
    left = sa.select(changed.c.old_key).where(changed.c.old_key != changed.c.customer_key)
    marked = insert_marks(target, left, FIRST_DAY, lost=True).cte("marked")
    updated = (
        sa.update(order_index)
        .where(same_order(changed), order_index.c.target == changed.c.target)
        .values({name: changed.c[name] for name in INDEXED})
        .cte("updated")
    )
    key = ("shop_id", "order_id", "target")
    is_new = ~sa.select(order_index.c.order_id).where(same_row).exists()
    # 按主键的次序插：B 树一页挨一页地写，不来回跳
    added = sa.select(*orders.c[*key, *INDEXED]).where(is_new).order_by(*orders.c[*key])
    return sa.insert(order_index).from_select([*key, *INDEXED], added).add_cte(changed, marked, updated)


def unindex_orders(connection: sa.Connection, target: str, gone: sa.Table, days: DayRange | None) -> None:
    """这些订单（shop_id、order_id）没有了：给它们的客户记陈旧，删去索引。"""
    theirs = sa.and_(same_order(gone), order_index.c.target == target)
    # 标记在前，删索引在后：只有索引还记得这些订单是谁的
    lost = sa.select(order_index.c.customer_key).join(gone, theirs)
    connection.execute(insert_marks(target, lost, FIRST_DAY, lost=True), _marked_on(days))
    connection.execute(sa.delete(order_index).where(theirs))


def insert_marks(
    target: str,
    customer_keys: sa.Select[tuple[str]],
    day: sa.ColumnElement[date] = ANY_DAY,
    *,
    since: str | None = None,
    lost: bool = False,
) -> sa.Insert:
    """语句：给每个按客户计算的资产各记一个标记；标记只增不改，谁修好谁删。

    :param day: 做这一天的运行去修；缺省是随便哪一个运行。
    :param since: 只给这个资产与它后面的。
    :param lost: 他们在这些天少了订单，整天重做也未必找得到：不在图里的资产也记，回来时要用。
    """
    keys = customer_keys.distinct().subquery("keys")
    (key,) = keys.c
    known = [
        sa.select(table.c.asset).where(table.c.target == target, table.c.by_customer)
        for table in (assets, absent_assets)
    ]
    if since is not None:
        known[0] = known[0].where(sa.literal(since) == sa.any_(LINE))
    marked = (sa.union_all(*known) if lost else known[0]).subquery("marked")
    marks = sa.select(sa.literal(target), marked.c.asset, key, day).select_from(keys).join(marked, sa.true())
    return sa.insert(stale_customers).from_select(["target", "asset", "customer_key", "day"], marks)


def adopt_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> int:
    """把别的 ETL 写进 orders 的行收进索引（这些天的、索引里没有或不符的）；返回收进的行数。

    份额之外的订单归别的 ETL，索引里记的是我们算出的赢家，不随它的行变。
    标记不归哪一天：收进它们的也许是人点的 leads，它的头一天未必还有 customers 要做。
    """
    if (
        _foreign_orders(connection, tables, days, share).is_empty()
        and _vanished_orders(connection, tables, days, share).is_empty()
    ):
        return 0
    lock_days(connection, tables.schema, days)  # 自己的 orders 运行可能正在写这些行：锁住再看一次
    foreign = _foreign_orders(connection, tables, days, share)
    named = foreign.select(pl.lit(tables.schema).alias("target"), *foreign.columns)
    staging = stage_frame(connection, named, name="foreign_orders", like=order_index)
    index_orders(connection, tables.schema, staging, None)
    release_staging(connection, staging)
    vanished = _vanished_orders(connection, tables, days, share)
    gone = stage_frame(connection, vanished, name="vanished_orders", like=order_index)
    unindex_orders(connection, tables.schema, gone, None)
    release_staging(connection, gone)
    return foreign.height + vanished.height


def adopt_all_orders(engine: sa.Engine, settings: EtlSettings) -> int:
    """把 orders 里索引还没有的行全收进来，不论份额；返回行数。

    接手旧系统的结果之前做：索引不全，一个客户的订单就读不全，他的商机会被当成没有订单的删掉，再以新的编号建起来。
    """
    target, orders = settings.target_schema, target_tables(settings.target_schema).orders
    indexed = sa.select(order_index.c.order_id).where(same_order(orders), order_index.c.target == target)
    unindexed = sa.select(orders.c.shop_id, orders.c.order_id, orders.c.customer_nickname, orders.c.order_date).where(
        orders.c.customer_nickname.is_not(None), ~indexed.exists()
    )
    names = ("shop_id", "order_id", "customer_nickname", "order_date", "customer_key")
    with (
        # 两条连接：COPY 读着的那条，读完之前不能作他用
        engine.connect() as source,
        engine.begin() as connection,
        kept_alive(connection, settings),
        reading_ahead(source, unindexed) as batches,
    ):
        staging = create_staging(
            connection, "adopted_orders", [sa.Column(name, order_index.c[name].type) for name in names]
        )
        for batch in batches:
            copy_into(connection, batch.with_columns(customer_key()).select(names), staging)
        insert = pg.insert(order_index).from_select(
            ["target", *names], sa.select(sa.literal(target), *staging.c[names])
        )
        # 有冲突，就是正有运行写同一个订单，它知道得更新
        # SQLAlchemy 缺省只留着 UPDATE 与 DELETE 的行数，INSERT 的要写明才有
        return connection.execute(
            insert.on_conflict_do_nothing(), execution_options={"preserve_rowcount": True}
        ).rowcount


def same_order(one: sa.FromClause, other: sa.FromClause = order_index) -> sa.ColumnElement[bool]:
    """SQL 条件：两边的行说的是同一个订单。"""
    return sa.and_(one.c.shop_id == other.c.shop_id, one.c.order_id == other.c.order_id)


def _foreign_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> pl.DataFrame:
    """一行一个订单。索引里有的，看它的客户在不在份额之内；没有的，看 orders 里的名字。"""
    orders = tables.orders
    indexed = sa.and_(same_order(orders), order_index.c.target == tables.schema)
    foreign = read_frame(
        connection,
        sa.select(
            *orders.c["shop_id", "order_id", "customer_nickname", "order_date"],
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
                        *[
                            order_index.c[name].is_distinct_from(orders.c[name])
                            for name in ("customer_nickname", "order_date")
                        ]
                    ),
                ),
            ),
        ),
    )
    return foreign.with_columns(customer_key()).filter(pl.col("is_indexed") | share.covers()).drop("is_indexed")


def _vanished_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> pl.DataFrame:
    """一行一个订单：索引里有，orders 里没有了。"""
    existing = sa.select(tables.orders.c.order_id).where(same_order(tables.orders)).exists()
    ours = sa.and_(order_index.c.target == tables.schema, share.covers_key(order_index.c.customer_key))
    indexed = sa.select(order_index.c.shop_id, order_index.c.order_id).where(
        ours, days.includes(order_index.c.order_date)
    )
    return read_frame(connection, indexed.where(~existing))
