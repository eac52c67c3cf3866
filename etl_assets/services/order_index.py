"""订单 → 客户的索引：与订单同一事务写下，找一个客户的订单不用扫全表；订单离开的客户在这里记为陈旧。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound
from etl_assets.core.database_sync import execute_together
from etl_assets.core.etl_tables import absent_assets, assets, order_index, stale_customers
from etl_assets.core.idle_transactions import kept_alive
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, customer_hash, left_behind, target_tables
from etl_assets.ledger.locks import lock_days
from etl_assets.ledger.marking import Scope
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import (
    analysis,
    analyze_staging,
    copy_into,
    create_staging,
    read_frame,
    reading_ahead,
    release_staging,
    stage_frame,
    take_staging,
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
    added = (
        sa.select(*orders.c[*key, *INDEXED]).where(~sa.select(order_index.c.order_id).where(same_row).exists()).order_by(*orders.c[*key])
    )
    return sa.insert(order_index).from_select([*key, *INDEXED], added).add_cte(changed, marked, updated)


def unindex_orders(connection: sa.Connection, target: str, gone: sa.Table, days: DayRange | None) -> None:
    """这些订单（shop_id、order_id）没有了：给它们的客户记陈旧，删去索引。"""
    theirs = sa.and_(same_order(gone), order_index.c.target == target)
    lost = sa.select(order_index.c.customer_key).join(gone, theirs)
    connection.execute(insert_marks(target, lost, FIRST_DAY, lost=True), _marked_on(days))
    connection.execute(sa.delete(order_index).where(theirs))


def insert_marks(
    target: str, customer_keys: sa.Select[tuple[str]], day: sa.ColumnElement[date] = ANY_DAY, *, lost: bool = False
) -> sa.Insert:
    """语句：给每个按客户计算的资产各记一个标记；标记只增不改，谁修好谁删。

    :param day: 做这一天的运行去修；缺省是随便哪一个运行。
    :param lost: 他们在这些天少了订单，整天重做也未必找得到：不在图里的资产也记，回来时要用。
    """
    keys = customer_keys.distinct().subquery("keys")
    (key,) = keys.c
    known = [sa.select(table.c.asset).where(table.c.target == target, table.c.by_customer) for table in (assets, absent_assets)]
    marked = (sa.union_all(*known) if lost else known[0]).subquery("marked")
    marks = sa.select(sa.literal(target), marked.c.asset, key, day).select_from(keys).join(marked, sa.true())
    return sa.insert(stale_customers).from_select(["target", "asset", "customer_key", "day"], marks)


def stage_customers(
    connection: sa.Connection, tables: TargetTables, asset: str, days: DayRange, share: Share, scope: Scope
) -> tuple[sa.Table, int]:
    """临时表 customers_at_hand 与其行数；position 从 0 起给客户编号。

    份额之内、该资产在这些天陈旧的客户，商机被人改得不像样的；整天做的，加上这些天有订单的全部客户。
    没有订单、只因有人碰过商机而留下的客户，算过一次就不再陈旧；人收手以后，哪一天的运行都从商机那里找到他，让他走。
    """
    at_hand, emptied = take_staging(connection, "customers_at_hand", _at_hand_columns())
    statements = (emptied, _insert_customers(at_hand, tables, asset, share, scope), analysis(connection, at_hand), _count_rows(at_hand))
    *_, ((count,),) = execute_together(connection, *statements, parameters=bound(days))
    return at_hand, count


@lru_cache(maxsize=16)
def _count_rows(table: sa.Table) -> sa.Select[tuple[int]]:
    return sa.select(sa.func.count()).select_from(table)


def _at_hand_columns() -> list[sa.Column[Any]]:
    return [sa.Column("customer_key", sa.Text), sa.Column("position", sa.Integer)]


def restage_customers(connection: sa.Connection, keys: pl.DataFrame) -> sa.Table:
    """同样的临时表，装着选定了的客户中的一口。"""
    at_hand = create_staging(connection, "customers_at_hand", _at_hand_columns())
    copy_into(connection, keys.with_row_index("position").select("customer_key", "position"), at_hand)
    analyze_staging(connection, at_hand)
    return at_hand


CONSUME_MARKS = sa.delete(stale_customers).where(
    stale_customers.c.mark_id == sa.any_(sa.bindparam("mark_ids", type_=sa.ARRAY(sa.BigInteger)))
)
"""删去修好的标记；事务失败则标记还在。"""


def adopt_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> int:
    """把别的 ETL 写进 orders 的行收进索引（这些天的、索引里没有或不符的）；返回收进的行数。

    份额之外的订单归别的 ETL，索引里记的是我们算出的赢家，不随它的行变。
    标记不归哪一天：收进它们的也许是人点的 leads，它的头一天未必还有 customers 要做。
    """
    if _foreign_orders(connection, tables, days, share).is_empty() and not _vanished_orders(connection, tables, days, share, limit=1):
        return 0
    lock_days(connection, tables.schema, days)  # 自己的 orders 运行可能正在写这些行：锁住再看一次
    foreign = _foreign_orders(connection, tables, days, share)
    named = foreign.select(pl.lit(tables.schema).alias("target"), *foreign.columns)
    staging = stage_frame(connection, named, name="foreign_orders", like=order_index)
    index_orders(connection, tables.schema, staging, None)
    release_staging(connection, staging)
    vanished = _vanished_orders(connection, tables, days, share)
    gone = stage_frame(
        connection,
        pl.DataFrame(vanished, schema={"shop_id": pl.String, "order_id": pl.String}, orient="row"),
        name="vanished_orders",
        like=order_index,
    )
    unindex_orders(connection, tables.schema, gone, None)
    release_staging(connection, gone)
    return foreign.height + len(vanished)


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
        engine.connect() as source,
        engine.begin() as connection,
        kept_alive(connection, settings),
        reading_ahead(source, unindexed) as batches,
    ):
        staging = create_staging(connection, "adopted_orders", [sa.Column(name, order_index.c[name].type) for name in names])
        for batch in batches:
            copy_into(connection, batch.with_columns(customer_key()).select(names), staging)
        insert = pg.insert(order_index).from_select(["target", *names], sa.select(sa.literal(target), *staging.c[names]))
        # 有冲突，就是正有运行写同一个订单，它知道得更新
        return connection.execute(insert.on_conflict_do_nothing(), execution_options={"preserve_rowcount": True}).rowcount


def same_order(other: sa.FromClause) -> sa.ColumnElement[bool]:
    """SQL 条件：索引里的这一行说的是那一行的订单。"""
    return sa.and_(order_index.c.shop_id == other.c.shop_id, order_index.c.order_id == other.c.order_id)


def _foreign_orders(connection: sa.Connection, tables: TargetTables, days: DayRange, share: Share) -> pl.DataFrame:
    """一行一个订单。索引里有的，看它的客户在不在份额之内；没有的，看 orders 里的名字。"""
    orders = tables.orders
    indexed = sa.and_(same_order(orders), order_index.c.target == tables.schema)
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
    existing = sa.select(tables.orders.c.order_id).where(same_order(tables.orders)).exists()
    rows = connection.execute(
        sa.select(order_index.c.shop_id, order_index.c.order_id)
        .where(order_index.c.target == tables.schema, days.includes(order_index.c.order_date), share.covers_key(order_index.c.customer_key))
        .where(~existing)
        .limit(limit)
    )
    return [(str(shop_id), order_id) for shop_id, order_id in rows]


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=64)
def _insert_customers(at_hand: sa.Table, tables: TargetTables, asset: str, share: Share, scope: Scope) -> sa.Insert:
    orders, target = tables.orders, tables.schema
    wanted = [sa.select(stale_customers.c.customer_key).where(of_days) for of_days in _stale(target, asset)]
    wanted.append(_released(tables))
    if scope == "whole":
        of_day = sa.and_(order_index.c.target == target, orders.c.order_date.between(FIRST_DAY, LAST_DAY))
        wanted.append(sa.select(order_index.c.customer_key).join(orders, same_order(orders)).where(of_day))
    of_share = [keys.where(share.covers_key(keys.selected_columns[0])) for keys in wanted]
    keys = sa.union(*of_share).subquery("keys")
    numbered = sa.select(keys.c.customer_key, sa.func.row_number().over() - 1)
    return sa.insert(at_hand).from_select(["customer_key", "position"], numbered)


def _released(tables: TargetTables) -> sa.Select[tuple[str]]:
    """商机被人改得不像样的客户。按行去找客户，不用联接：规划器会把这样的商机估得很多，于是读全部客户。"""
    customers, leads = tables.customers, tables.leads
    owner = sa.select(customers.c.customer_key).where(customers.c.customer_global_id == leads.c.customer_global_id).scalar_subquery()
    released = sa.select(owner.label("customer_key")).where(left_behind(leads)).subquery("released")
    return sa.select(released.c.customer_key).where(released.c.customer_key.is_not(None))


def _stale(target: str, asset: str) -> list[sa.ColumnElement[bool]]:
    """该资产在这些天的标记，与哪天都行的：两个条件，各走一段索引。"""
    of_asset = sa.and_(stale_customers.c.target == target, stale_customers.c.asset == asset)
    return [sa.and_(of_asset, of_days) for of_days in (stale_customers.c.day.between(FIRST_DAY, LAST_DAY), stale_customers.c.day.is_(None))]


@lru_cache(maxsize=64)
def marks_of(target: str, asset: str, at_hand: sa.Table) -> sa.CompoundSelect[tuple[int]]:
    """语句：手头客户此刻的标记；锁住客户之后、读订单之前读，所以只消掉确实修好的。"""
    is_at_hand = at_hand.c.customer_key == stale_customers.c.customer_key
    return sa.union_all(*[sa.select(stale_customers.c.mark_id).join(at_hand, is_at_hand).where(mine) for mine in _stale(target, asset)])
