"""只做变了的：等着的导入点名的订单，连同它们在别处的版本。说不清变了什么，就说为什么要整天做。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound
from etl_assets.core.etl_tables import TARGET, day_accounts
from etl_assets.core.tables import TIMESTAMP, own_columns
from etl_assets.ledger.marking import Revisions
from etl_assets.orders.transform import References, TransformedRows, reject_unindexable, transform
from etl_assets.services import raw_rows
from etl_assets.services.day_accounts import StoredDay, read_stored_days
from etl_assets.services.materialization import DataTransaction
from etl_assets.services.order_index import same_order
from etl_assets.services.vectorized_queries import read_frame

FEW_ROWS = 1_000
MANY_ROWS = 50_000
"""等着的导入超过这么多行，或超过这些天的四分之一，逐个去找不如整天读；再少的不算。"""

KEY = ("shop_id", "order_id")


class WholeDaysNeededError(Exception):
    """这些天要整天做；消息是为什么。"""


@dataclass(frozen=True)
class ChangedOrders:
    """等着的导入点名的、与这些天有关的订单。

    :param rows: 它们的全部有效版本，与等着的导入在这些天被拒收的行。
    :param import_ids: 等着的导入。
    :param existing: 它们此刻在 orders 里的行，一行一个订单。
    :param stored: 每天存着的账。
    :param counted: 账里已有的：day、import_id、rows；一行一天的一次导入。
    :param arrived: 这些导入在这些天的行数：day、import_id、rows。
    """

    rows: TransformedRows
    import_ids: list[str]
    existing: pl.DataFrame
    stored: Mapping[date, StoredDay]
    counted: pl.DataFrame
    arrived: pl.DataFrame

    def days_of_rows(self) -> set[date]:
        """这些订单的版本与行所在的日子。"""
        return {*self.rows.versions["order_date"].unique(), *self.existing["order_date"].drop_nulls().unique()}


def read_changed(
    transaction: DataTransaction, source: sa.Connection, references: References, revisions: Revisions
) -> ChangedOrders:
    """在锁住这些天之后读。

    :raises WholeDaysNeededError: 说不清变了什么，或者不值得逐个去找。
    """
    if transaction.scope(revisions) == "whole":
        raise WholeDaysNeededError(revisions.whole or "asked for by a person, a schedule or a backfill")
    if not transaction.share.is_whole:
        raise WholeDaysNeededError("ETL_ROLLOUT leaves customers to another system")
    rows = raw_rows.scope(transaction.settings)
    import_ids = list(revisions.waiting)
    # 先只读少的：几乎总是几行，不必先问这些天有多大
    named = read_frame(source, _rows_of_imports(rows), {"import_ids": import_ids, "at_most": FEW_ROWS + 1})
    if named.height > FEW_ROWS:
        limit = read_limit(source, transaction)
        named = read_frame(source, _rows_of_imports(rows), {"import_ids": import_ids, "at_most": limit + 1})
        if named.height > limit:
            raise WholeDaysNeededError(f"the waiting imports name over {limit} rows")
    days = transaction.days
    judged = _judge(transaction, named, references)
    keys = judged.versions.select(KEY).unique()
    others = read_frame(source, _rows_of_orders(rows), _named(keys, references.shops, import_ids))
    elsewhere = _judge(transaction, others, references)
    versions = pl.concat([judged.versions, elsewhere.versions])
    existing = read_frame(transaction.connection, _rows_in_orders(transaction.tables.orders), named_keys(keys))
    on_days = pl.col("order_date").is_between(days.first, days.last)
    at_hand = pl.concat([versions.filter(on_days).select(KEY), existing.filter(on_days).select(KEY)]).unique()
    versions, existing = (frame.join(at_hand, on=KEY, how="semi") for frame in (versions, existing))
    _assert_ours(versions, existing)
    of_versions = versions["import_id"].unique().to_list()
    days_at_hand = {*days, *versions["order_date"].unique()}
    stored, counted = read_stored_days(
        transaction.connection, transaction.target, days_at_hand, [*import_ids, *of_versions]
    )
    arrived = named.filter(pl.col("day").is_between(days.first, days.last))
    changed = ChangedOrders(
        rows=TransformedRows(versions=versions, rejected=judged.rejected),
        import_ids=import_ids,
        existing=existing,
        stored=stored,
        counted=counted,
        arrived=arrived.group_by("day", "import_id").agg(pl.len().cast(pl.Int64).alias("rows")),
    )
    _assert_counted(changed, days, revisions)
    return changed


def read_limit(source: sa.Connection, transaction: DataTransaction) -> int:
    """等着的导入至多有多少行，才值得逐个去找。"""
    stored_rows = source.scalar(_STORED_ROWS, {"of_target": transaction.target, **bound(transaction.days)})
    return min(max(FEW_ROWS, (stored_rows or 0) // 4), MANY_ROWS)


def _assert_ours(versions: pl.DataFrame, existing: pl.DataFrame) -> None:
    """orders 里的行，都该正是它的一个版本此刻算出来的样子；不是，就有别人改过，或备份恢复过。"""
    names = existing.columns
    # nulls_equal：类型可以是 NULL，而 Polars 的联接里 NULL 缺省谁也不等
    ours = existing.cast({name: versions.schema[name] for name in names}).join(
        versions.select(names), on=names, how="semi", nulls_equal=True
    )
    if ours.height < existing.height:
        raise WholeDaysNeededError("rows of orders are not as they were written")


def _judge(transaction: DataTransaction, rows: pl.DataFrame, references: References) -> TransformedRows:
    return reject_unindexable(transaction.connection, transform(rows, references, transaction.days), transaction.days)


def _assert_counted(changed: ChangedOrders, days: DayRange, revisions: Revisions) -> None:
    """账记着这些天；账里有的导入行数没有变，它点名的订单都在 orders 里，那一行也在账里。"""
    # 旧版本的工人做一天时不记账：存着的账是更早的，接不上
    if any(day not in changed.stored or changed.stored[day].run_id != revisions.made_by.get(day) for day in days):
        raise WholeDaysNeededError("the day has no account of its last run")
    known = changed.arrived.join(changed.counted, on=["day", "import_id"], how="inner")
    if not (known["rows"] == known["rows_right"]).all():
        raise WholeDaysNeededError("an import has other rows than when it was counted")
    counted_days = changed.counted.rename({"day": "order_date"})
    counted = changed.rows.versions.join(counted_days, on=["order_date", "import_id"], how="semi")
    if not counted.join(changed.existing, on=KEY, how="anti").is_empty():
        raise WholeDaysNeededError("rows of orders are not as they were written")
    accounted = changed.existing.filter(pl.col("order_date").is_in(list(changed.stored)))
    if not accounted.join(counted_days, on=["order_date", "import_id"], how="anti").is_empty():
        # 事件早到的另一次导入的运行写的，还是别的系统先写的，看不出来；别的系统写的，客户还没有算过
        raise WholeDaysNeededError("rows of orders are from an import that is not counted yet")


def named_keys(keys: pl.DataFrame) -> Mapping[str, list[str]]:
    """参数 shop_ids 与 order_ids：一个位置一个订单。"""
    return {"shop_ids": keys["shop_id"].to_list(), "order_ids": keys["order_id"].to_list()}


def _named(keys: pl.DataFrame, shops: pl.DataFrame, import_ids: list[str]) -> Mapping[str, list[str]]:
    named = keys.join(shops, on="shop_id")
    return {"shops": named["shop"].to_list(), "order_ids": named["order_id"].to_list(), "import_ids": import_ids}


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

IMPORT_IDS = array("import_ids", sa.Uuid(as_uuid=False))
_ORDER_KEYS = {
    "shop_id": array("shop_ids", sa.Uuid(as_uuid=False)),
    "order_id": array("order_ids", sa.Text),
}
_FIRST_MOMENT, _LAST_MOMENT = (
    sa.cast(moment, TIMESTAMP) for moment in ("0001-01-02 00:00:00+00", "9999-12-30 00:00:00+00")
)
_STORED_ROWS = sa.select(
    sa.cast(sa.func.sum(sa.cast(day_accounts.c.account["raw"].astext, sa.BigInteger)), sa.BigInteger)
).where(day_accounts.c.target == TARGET, day_accounts.c.day.between(FIRST_DAY, LAST_DAY))


@lru_cache(maxsize=8)
def _rows_of_imports(rows: sa.Subquery) -> sa.Select[Any]:
    of_imports = sa.select(*raw_rows.frame_columns(rows)).where(rows.c.import_id == sa.any_(IMPORT_IDS))
    return of_imports.limit(sa.bindparam("at_most", type_=sa.BigInteger))


@lru_cache(maxsize=8)
def _rows_of_orders(rows: sa.Subquery) -> sa.Select[Any]:
    """这些订单在别的导入里的版本。"""
    return raw_rows.of_orders(rows, _ORDER_KEYS["order_id"], array("shops", sa.Text)).where(
        rows.c.import_id != sa.all_(IMPORT_IDS)
    )


@lru_cache(maxsize=8)
def _rows_in_orders(orders: sa.Table) -> sa.Select[Any]:
    # Polars 装不下的值（NaN、无穷大）当作 NULL：那不是我们写的，与哪个版本都不同
    fitting = {
        "amount": sa.case((orders.c.amount != sa.cast("NaN", orders.c.amount.type), orders.c.amount)),
        "ordered_at": sa.case((orders.c.ordered_at.between(_FIRST_MOMENT, _LAST_MOMENT), orders.c.ordered_at)),
    }
    return _of_named(orders, *[fitting.get(column.name, column).label(column.name) for column in own_columns(orders)])


@lru_cache(maxsize=8)
def rows_of_orders(orders: sa.Table) -> sa.Select[Any]:
    """这些订单在 orders 里的行，一行一个：shop_id、order_id、raw_id；参数见 `named_keys`。"""
    return _of_named(orders, sa.cast(orders.c.shop_id, sa.Text), orders.c.order_id, orders.c.raw_id)


def _of_named(orders: sa.Table, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    named = unnest("named", **_ORDER_KEYS)
    return sa.select(*columns).join(named, same_order(orders, named))
