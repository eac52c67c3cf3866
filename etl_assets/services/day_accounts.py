"""每天的账记在表里：整天做的重新数过，只做变了的接着上一次的账算，仍旧要平。"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import unnest
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.etl_tables import counted_imports, day_accounts, rejected_rows
from etl_assets.core.tables import target_tables
from etl_assets.services.accounting import EXAMPLES, AccountingError, DayAccount
from etl_assets.services.vectorized_queries import read_frame
from etl_assets.services.warned_rows import DayWarnings, warn_by_day

_KEY = ["shop_id", "order_id"]
_MOST_TYPES = 50


@dataclass(frozen=True)
class StoredDay:
    """一天存着的账与警告，是 run_id 做完这一天时的；后来又由不记账的旧版本做过的，对不上台账。"""

    account: DayAccount
    warnings: DayWarnings | None
    run_id: str

    @classmethod
    def parse(cls, day: date, stored: Mapping[str, Any]) -> StoredDay:
        warnings = stored["warnings"]
        account = {name: value for name, value in stored.items() if name not in ("warnings", "run_id")}
        return cls(DayAccount(day=day, **account), DayWarnings(**warnings) if warnings else None, stored["run_id"])

    def format(self) -> dict[str, Any]:
        account = {name: value for name, value in asdict(self.account).items() if name not in ("day", "lost_examples")}
        return {**account, "warnings": asdict(self.warnings) if self.warnings else None, "run_id": self.run_id}


def read_stored_days(
    connection: sa.Connection, target: str, days: Iterable[date], import_ids: Iterable[str]
) -> tuple[Mapping[date, StoredDay], pl.DataFrame]:
    """存着账的日子，与这些导入里账上已有的：day、import_id、rows，一行一天的一次导入。"""
    parameters = {"of_target": target, "days": sorted(days), "import_ids": sorted(set(import_ids))}
    rows = connection.execute(_STORED_DAYS, parameters).all()
    counted = [(row.day, import_id, count) for row in rows for import_id, count in (row.counted or {}).items()]
    schema = {"day": pl.Date, "import_id": pl.String, "rows": pl.Int64}
    return {row.day: StoredDay.parse(row.day, row.account) for row in rows}, pl.DataFrame(counted, schema=schema, orient="row")


def store_counted_days(connection: sa.Connection, target: str, days: DayRange, stored: Iterable[StoredDay], counted: pl.DataFrame) -> None:
    """整天数过的：存下账，与账上各次导入的行数（day、import_id、rows），先前的作废。"""
    connection.execute(_FORGET_COUNTED, {"of_target": target, "first": days.first, "last": days.last})
    if values := _stored_values(target, list(stored), counted):
        execute_compiled(connection, _STORE, values)


def forget_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """这些天的账不作数了：它们下一次整天做。"""
    connection.execute(_FORGET_DAYS, {"of_target": target, "days": sorted(days)})


def forget_accounts_with(connection: sa.Connection, target: str, import_ids: Iterable[UUID], days: Iterable[date]) -> None:
    """这些天里，账上有这些导入的行的，账不作数了：人点的运行见过它们，而它们撤回了，没有一行在表里。"""
    connection.execute(_FORGET_WITH, {"of_target": target, "import_ids": [str(import_id) for import_id in import_ids], "days": list(days)})


def carry_forward(
    connection: sa.Connection,
    target: str,
    stored: Mapping[date, StoredDay],
    *,
    days: DayRange,
    run_id: str,
    versions: pl.DataFrame,
    before: pl.DataFrame,
    after: pl.DataFrame,
    counted: pl.DataFrame,
    arrived: pl.DataFrame,
    rejecting: Sequence[str],
    defer: Callable[[sa.ClauseElement, Mapping[str, object]], None],
) -> Mapping[date, StoredDay]:
    """写完之后：手头的行此刻各在哪里，从表里读回来的，与写之前相比，记进这些天的账。

    账上没有的导入（事件还没到），它的行现在不算，等着它的运行再算。

    :param stored: 手头的版本所在的日子里存着账的；没有账的日子不记，它要整天做。
    :param days: 其中 run_id 做完的日子；别的只是手头的订单也有版本在那里。
    :param versions: 手头订单的有效版本，一行一个：raw_id、shop_id、order_id、import_id、order_date、raw_order_type、
        is_unmapped、is_repeated。
    :param before: 写之前它们在 orders 里的行：shop_id、order_id、raw_id；after 是写完之后 `rows_of_orders` 的。
    :param counted: 账上已有的：day、import_id、rows。
    :param arrived: 等着的导入在这些天的行数：day、import_id、rows。
    :param rejecting: 其中有行拒收的导入。
    :param defer: 存下账的语句与参数交给它，不必自己一次往返。
    :raises AccountingError: 有一天不平。
    """
    pair = ["day", "import_id"]
    new = arrived.join(counted, on=pair, how="anti")
    rejected = _read_rejected(connection, target, rejecting).join(new, on=pair, how="semi")
    counted_now = pl.concat([counted.select(pair), new.select(pair)])
    # 先前只算账上有的，现在连同新来的：新导入的行由此进账，重复的事件不会记两次
    was = _place(versions, before, counted.select(pair))
    now = _place(versions, after, counted_now)
    raw = dict(new.group_by("day").agg(pl.col("rows").sum()).iter_rows())
    span = DayRange(min(stored), max(stored))
    warned_before, warned_now = (warn_by_day(span, *_warned(placed)) for placed in (was, now))
    carried = {
        day: StoredDay(
            _carry_account(
                old.account, raw.get(day, 0), was.filter(order_date=day), now.filter(order_date=day), rejected.filter(pl.col("day") == day)
            ),
            _carry_warnings(old.warnings, warned_before.get(day), warned_now.get(day)),
            run_id if days.first <= day <= days.last else old.run_id,
        )
        for day, old in stored.items()
    }
    if unbalanced := [day.account for day in carried.values() if day.account.difference]:
        lost = now.filter(pl.col("place") == "lost", order_date=unbalanced[0].day)["raw_id"].sort().head(EXAMPLES).to_list()
        raise AccountingError([replace(unbalanced[0], lost_examples=lost), *unbalanced[1:]])
    if values := _stored_values(target, [new_day for day, new_day in carried.items() if new_day != stored[day]], new):
        defer(_STORE, values)
    return carried


def _read_rejected(connection: sa.Connection, target: str, import_ids: Sequence[str]) -> pl.DataFrame:
    if not import_ids:  # 几乎总是这样
        return pl.DataFrame(schema={"raw_id": pl.Int64, "import_id": pl.String, "day": pl.Date, "rule": pl.String})
    return read_frame(connection, _rejected_rows(target), {"import_ids": list(import_ids)})


def _place(versions: pl.DataFrame, rows: pl.DataFrame, counted: pl.DataFrame) -> pl.DataFrame:
    """账上的版本各在哪里：loaded、superseded（它的订单在 orders 里是别的版本），或 lost。"""
    of_account = versions.join(counted, left_on=["order_date", "import_id"], right_on=["day", "import_id"], how="semi")
    winner = pl.col("winner")
    is_winner = pl.when(winner == pl.col("raw_id")).then(pl.lit("loaded")).otherwise(pl.lit("superseded"))
    place = pl.when(winner.is_null()).then(pl.lit("lost")).otherwise(is_winner)
    return of_account.join(rows.select(*_KEY, winner=pl.col("raw_id")), on=_KEY, how="left").with_columns(place=place)


def _warned(placed: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    return placed.filter(pl.col("place") == "superseded"), placed.filter(pl.col("place") == "loaded", "is_unmapped")


def _carry_account(account: DayAccount, raw: int, was: pl.DataFrame, now: pl.DataFrame, rejected: pl.DataFrame) -> DayAccount:
    change = {place: now.filter(place=place).height - was.filter(place=place).height for place in ("loaded", "superseded")}
    rules = Counter(dict(account.rejected))
    rules.update(dict(rejected.group_by("rule").len().iter_rows()))
    examples = dict(rejected.group_by("rule").agg("raw_id").iter_rows())
    return replace(
        account,
        raw=account.raw + raw,
        loaded=account.loaded + change["loaded"],
        superseded=account.superseded + change["superseded"],
        rejected=dict(rules),
        rejected_examples={rule: sorted({*account.rejected_examples.get(rule, ()), *examples.get(rule, ())})[:EXAMPLES] for rule in rules},
    )


def _carry_warnings(stored: DayWarnings | None, was: DayWarnings | None, now: DayWarnings | None) -> DayWarnings | None:
    """账上原有的，减去手头的先前的，加上手头的现在的。"""
    if was == now:
        return stored
    rows, types, examples = Counter[str](), Counter[str](), dict[str, set[int]]()
    for warnings, sign in ((stored, 1), (was, -1), (now, 1)):
        if warnings is None:
            continue
        rows.update({rule: sign * count for rule, count in warnings.rows.items()})
        types.update({name: sign * count for name, count in warnings.types.items()})
        for rule, raw_ids in warnings.examples.items():
            known = examples.setdefault(rule, set())
            examples[rule] = known | set(raw_ids) if sign > 0 else known - set(raw_ids)
    rows = +rows
    if not rows:
        return None
    return DayWarnings(
        rows=dict(rows),
        examples={rule: sorted(examples.get(rule, ()))[:EXAMPLES] for rule in rows},
        types=dict((+types).most_common(_MOST_TYPES)),
    )


def _stored_values(target: str, days: Sequence[StoredDay], counted: pl.DataFrame) -> dict[str, object] | None:
    """没有什么要存的是 None。"""
    if not days and counted.is_empty():
        return None
    return {
        "of_target": target,
        "days": [day.account.day for day in days],
        "accounts": [json.dumps(day.format()) for day in days],
        "counted_days": counted["day"].to_list(),
        "import_ids": counted["import_id"].to_list(),
        "counts": counted["rows"].to_list(),
    }


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_TARGET = sa.bindparam("of_target", type_=sa.Text)
_IMPORT_IDS = sa.bindparam("import_ids", type_=sa.ARRAY(sa.Uuid(as_uuid=False)))
_DAYS = (sa.bindparam("first", type_=sa.Date), sa.bindparam("last", type_=sa.Date))
_IS_COUNTED = sa.and_(
    counted_imports.c.target == day_accounts.c.target,
    counted_imports.c.day == day_accounts.c.day,
    counted_imports.c.import_id == sa.any_(_IMPORT_IDS),
)
_COUNTED = (
    sa.select(sa.func.jsonb_object_agg(counted_imports.c.import_id, counted_imports.c.rows, type_=pg.JSONB))
    .where(_IS_COUNTED)
    .scalar_subquery()
)
_OF_DAYS = sa.and_(day_accounts.c.target == _TARGET, day_accounts.c.day == sa.any_(sa.bindparam("days", type_=sa.ARRAY(sa.Date))))
_STORED_DAYS = sa.select(day_accounts.c.day, day_accounts.c.account, _COUNTED.label("counted")).where(_OF_DAYS)
_FORGET_COUNTED = sa.delete(counted_imports).where(counted_imports.c.target == _TARGET, counted_imports.c.day.between(*_DAYS))
_FORGET_DAYS = sa.delete(day_accounts).where(_OF_DAYS)
_FORGET_WITH = _FORGET_DAYS.where(sa.select(counted_imports.c.rows).where(_IS_COUNTED).exists())


def _store_statement() -> pg.Insert:
    stored = unnest("stored", day=sa.bindparam("days", type_=sa.ARRAY(sa.Date)), account=sa.bindparam("accounts", type_=sa.ARRAY(sa.Text)))
    counted = unnest(
        "counted",
        day=sa.bindparam("counted_days", type_=sa.ARRAY(sa.Date)),
        import_id=_IMPORT_IDS,
        rows=sa.bindparam("counts", type_=sa.ARRAY(sa.Integer)),
    )
    count = pg.insert(counted_imports).from_select(["target", "day", "import_id", "rows"], sa.select(_TARGET, *counted.c)).cte("counting")
    accounts = sa.select(_TARGET, stored.c.day, sa.cast(stored.c.account, pg.JSONB))
    insert = pg.insert(day_accounts).from_select(["target", "day", "account"], accounts)
    return insert.on_conflict_do_update(index_elements=["target", "day"], set_={"account": insert.excluded.account}).add_cte(count)


_STORE = _store_statement()


ORDER_KEYS = {
    "shop_id": sa.bindparam("shop_ids", type_=sa.ARRAY(sa.Uuid(as_uuid=False))),
    "order_id": sa.bindparam("order_ids", type_=sa.ARRAY(sa.Text)),
}
"""参数 shop_ids 与 order_ids：一个位置一个订单。"""


@lru_cache(maxsize=8)
def rows_of_orders(schema: str) -> sa.Select[Any]:
    """一行一个订单：shop_id、order_id、raw_id；参数是 shop_ids 与 order_ids。"""
    orders = target_tables(schema).orders
    keys = sa.select(unnest("key", **ORDER_KEYS)).distinct().subquery("keys")
    same = sa.and_(orders.c.shop_id == keys.c.shop_id, orders.c.order_id == keys.c.order_id)
    return sa.select(sa.cast(orders.c.shop_id, sa.Text), orders.c.order_id, orders.c.raw_id).join(keys, same)


@lru_cache(maxsize=8)
def _rejected_rows(schema: str) -> sa.Select[Any]:
    rejected = rejected_rows.c
    return sa.select(rejected.raw_id, rejected.import_id, rejected.day, rejected.rule).where(
        rejected.target == schema, rejected.import_id == sa.any_(_IMPORT_IDS), rejected.day.is_not(None)
    )
