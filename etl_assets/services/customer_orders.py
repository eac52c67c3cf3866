"""手头的客户（有订单的、陈旧的）与他们的全部订单：customers 与 leads 两个 ETL 的共同输入。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound
from etl_assets.core.database_sync import execute_together, note_staged
from etl_assets.core.etl_tables import order_index, stale_customers
from etl_assets.core.tables import TargetTables, left_behind
from etl_assets.ledger.locks import lock_customers, stripe_of
from etl_assets.ledger.marking import Revisions, Scope
from etl_assets.services.batch import bite_of, whole_groups
from etl_assets.services.customer_keys import customer_id
from etl_assets.services.figures import has_status, status_spellings
from etl_assets.services.materialization import Begin, DataTransaction, retry_conflicts
from etl_assets.services.order_index import adopt_orders, of_customer, same_order
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import (
    WriteCounts,
    analysis,
    read_frame,
    reading_ahead,
    stage_columns,
    take_staging,
)

Write: TypeAlias = Callable[[DataTransaction, sa.Table, pl.DataFrame], WriteCounts]
"""读、算、写这些锁住的客户；给它的还有 `read_customer_ids` 的结果。"""
Done = TypeVar("Done")


@dataclass(frozen=True, kw_only=True)
class Computed:
    """客户都算好、写下了，台账还没有记：选客户之前的台账版本、做多少、写下的行数、物化开始的时刻。"""

    revisions: Revisions
    scope: Scope
    written: WriteCounts
    started_at: float


@dataclass(frozen=True, kw_only=True)
class _Many:
    """一个事务里做不完的客户：keys 一行一个，同一条锁行上的排在一起。"""

    keys: pl.DataFrame
    chosen: Computed


def compute_in_bites(begin: Begin, *, write: Write, complete: Callable[[DataTransaction, Computed], Done]) -> Done:
    """选定这次要算的客户，都算好，最后交给 `complete`，由它记台账。

    一口做得完，全在一个事务里。做不完，一口一个事务：锁住、读标记与订单、写、消标记、提交，别的运行等的只是这一口。
    台账到最后才记，所以死在半途时这些天仍然到期，再做一遍结果一样；选定之后才变的，由那以后的要求或标记管。
    """
    first = retry_conflicts(_choose)(begin, write, complete)
    if not isinstance(first, _Many):
        return first
    computed = first.chosen
    for keys in first.keys.iter_slices(bite_of(first.keys.height)):
        written = retry_conflicts(_compute_bite)(begin, computed.started_at, keys, write)
        computed = replace(computed, written=computed.written + written)
    return retry_conflicts(_complete)(begin, computed, complete)


def _choose(begin: Begin, write: Write, complete: Callable[[DataTransaction, Computed], Done]) -> Done | _Many:
    """先读台账再选客户：选定之后才来的要求由下一次运行做。只有一口的，就在这里做完。"""
    with begin() as transaction:
        connection, tables, asset = transaction.connection, transaction.tables, transaction.asset
        revisions = transaction.read_revisions()
        scope = transaction.scope(revisions)
        if scope == "whole" and not _is_indexed(transaction):  # 别处写的订单没有索引
            # 在选客户之前：收进来时给旧客户留下的标记，这一次就选得到
            adopt_orders(connection, tables, transaction.days, transaction.share)
        table, count = stage_customers(connection, tables, asset, transaction.days, transaction.share, scope)
        chosen = Computed(revisions=revisions, scope=scope, written=WriteCounts(), started_at=transaction.started_at)
        if count > bite_of(count):
            keys = read_frame(connection, _by_stripe(table))
            # 由 SELECT 填的暂存表没有经过 COPY，占了多少要自己记
            note_staged(connection, int(keys.estimated_size()))
            return _Many(keys=keys, chosen=chosen)
        written = _compute(transaction, table, write) if count else WriteCounts()
        return complete(transaction, replace(chosen, written=written))


def _is_indexed(transaction: DataTransaction) -> bool:
    """这个运行里的上游看过全部订单的索引：写订单的，或者也按客户算的。"""
    run, tables = transaction.run, transaction.tables
    indexing = {
        asset for asset, each in descriptions().items() if each.by_customer or tables.of_asset[asset] is tables.orders
    }
    return not indexing.isdisjoint(run.upstreams & run.assets)


def _compute_bite(begin: Begin, started_at: float, keys: pl.DataFrame, write: Write) -> WriteCounts:
    with begin(started_at=started_at) as transaction:
        return _compute(transaction, restage_customers(transaction.connection, keys), write)


def _complete(begin: Begin, computed: Computed, complete: Callable[[DataTransaction, Computed], Done]) -> Done:
    with begin(started_at=computed.started_at) as transaction:
        return complete(transaction, computed)


def _compute(transaction: DataTransaction, at_hand: sa.Table, write: Write) -> WriteCounts:
    """锁住了才读；标记在读订单之前读，所以消掉的都确实修好了。"""
    connection, target = transaction.connection, transaction.target
    statements = (marks_of(target, transaction.asset, at_hand), _customer_ids(transaction.tables, at_hand))
    marks, ids = lock_customers(connection, target, at_hand, then=statements, parameters=bound(transaction.days))
    known = pl.DataFrame(ids, schema={"customer_key": pl.String, "customer_global_id": pl.String}, orient="row")
    written = write(transaction, at_hand, _with_ids(known))
    transaction.written += written
    # 只删锁住之后读到的那几个：此后别人又给同一个客户记的，还没有修
    transaction.defer(CONSUME_MARKS, {"mark_ids": [mark_id for (mark_id,) in marks]})
    return written


def stage_customers(
    connection: sa.Connection, tables: TargetTables, asset: str, days: DayRange, share: Share, scope: Scope
) -> tuple[sa.Table, int]:
    """临时表 customers_at_hand 与其行数；position 从 0 起给客户编号。

    份额之内、该资产在这些天陈旧的客户，商机被人改得不像样的；整天做的，加上这些天有订单的全部客户。
    没有订单、只因有人碰过商机而留下的客户，算过一次就不再陈旧；人收手以后，哪一天的运行都从商机那里找到他，让他走。
    """
    at_hand, emptied = take_staging(connection, "customers_at_hand", _at_hand_columns())
    insert = _insert_customers(at_hand, tables, asset, share, scope)
    statements = (emptied, insert, analysis(connection, at_hand), _count_rows(at_hand))
    *_, ((count,),) = execute_together(connection, *statements, parameters=bound(days))
    return at_hand, count


@lru_cache(maxsize=16)
def _count_rows(table: sa.Table) -> sa.Select[tuple[int]]:
    return sa.select(sa.func.count()).select_from(table)


def _at_hand_columns() -> list[sa.Column[Any]]:
    return [sa.Column("customer_key", sa.Text), sa.Column("position", sa.Integer)]


def restage_customers(connection: sa.Connection, keys: pl.DataFrame) -> sa.Table:
    """同样的临时表，装着选定了的客户中的一口。"""
    bite = keys.with_row_index("position").select("customer_key", "position")
    at_hand = stage_columns(connection, bite, name="customers_at_hand", columns=_at_hand_columns())
    connection.exec_driver_sql(analysis(connection, at_hand))
    return at_hand


CONSUME_MARKS = sa.delete(stale_customers).where(stale_customers.c.mark_id == sa.any_(array("mark_ids", sa.BigInteger)))
"""删去修好的标记；事务失败则标记还在。"""


def read_customer_orders(transaction: DataTransaction, at_hand: sa.Table) -> Iterator[pl.DataFrame]:
    """手头客户的全部订单，一行一个订单，分成若干帧：一个客户的订单都在同一帧，按 (customer_key, ordered_at, order_id) 排好。

    is_counted：状态不在取消之列；is_completed：状态在完成之列而不在取消之列。读完之前连接不能作他用。
    """
    settings = transaction.settings
    with reading_ahead(transaction.connection, _customer_orders(transaction.tables, at_hand)) as frames:
        for frame in whole_groups(frames, "position"):
            spellings = status_spellings(frame["latest_status"])
            cancelled = has_status(spellings, settings.cancelled_statuses)
            completed = has_status(spellings, settings.completed_statuses)
            marked = frame.drop("position").with_columns(is_counted=~cancelled, is_completed=completed & ~cancelled)
            yield marked.sort("customer_key", "ordered_at", "order_id")


def read_customer_ids(transaction: DataTransaction, at_hand: sa.Table) -> pl.DataFrame:
    """手头客户一行一个：customer_key 与 customer_global_id；customers 里已有的 id 优先，is_known 表示已有。"""
    return _with_ids(read_frame(transaction.connection, _customer_ids(transaction.tables, at_hand)))


def _with_ids(existing: pl.DataFrame) -> pl.DataFrame:
    known = pl.col("customer_global_id").is_not_null().alias("is_known")
    return existing.with_columns(known, pl.coalesce("customer_global_id", customer_id()).alias("customer_global_id"))


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=16)
def _by_stripe(customers: sa.Table) -> sa.Select[tuple[str]]:
    key = customers.c.customer_key
    return sa.select(key).order_by(stripe_of(key), key)


@lru_cache(maxsize=64)
def _customer_orders(tables: TargetTables, at_hand: sa.Table) -> sa.Select[Any]:
    orders = tables.orders
    names = (
        "order_id",
        "customer_nickname",
        "latest_status",
        "system_order_type",
        "amount",
        "ordered_at",
        "order_date",
    )
    return (
        sa.select(at_hand.c.position, order_index.c.customer_key, *orders.c[names])
        .select_from(at_hand)
        .join(order_index, of_customer(at_hand.c.customer_key))
        .join(orders, same_order(orders))
        .where(order_index.c.target == tables.schema)
        .order_by(at_hand.c.position)
    )


@lru_cache(maxsize=64)
def _customer_ids(tables: TargetTables, at_hand: sa.Table) -> sa.Select[Any]:
    customers = tables.customers
    known_id = sa.cast(customers.c.customer_global_id, sa.Text).label("customer_global_id")
    return sa.select(at_hand.c.customer_key, known_id).outerjoin(
        customers, customers.c.customer_key == at_hand.c.customer_key
    )


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
    owner = (
        sa.select(customers.c.customer_key)
        .where(customers.c.customer_global_id == leads.c.customer_global_id)
        .scalar_subquery()
    )
    released = sa.select(owner.label("customer_key")).where(left_behind(leads)).subquery("released")
    return sa.select(released.c.customer_key).where(released.c.customer_key.is_not(None))


def _stale(target: str, asset: str) -> list[sa.ColumnElement[bool]]:
    """该资产在这些天的标记，与哪天都行的：两个条件，各走一段索引。"""
    marks = stale_customers.c
    of_asset = sa.and_(marks.target == target, marks.asset == asset)
    return [sa.and_(of_asset, of_days) for of_days in (marks.day.between(FIRST_DAY, LAST_DAY), marks.day.is_(None))]


@lru_cache(maxsize=64)
def marks_of(target: str, asset: str, at_hand: sa.Table) -> sa.CompoundSelect[tuple[int]]:
    """语句：手头客户此刻的标记；锁住客户之后、读订单之前读，所以只消掉确实修好的。"""
    theirs = sa.select(stale_customers.c.mark_id).join(
        at_hand, at_hand.c.customer_key == stale_customers.c.customer_key
    )
    return sa.union_all(*[theirs.where(mine) for mine in _stale(target, asset)])
