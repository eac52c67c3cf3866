"""只做变了的运行接着上一次的账算：手头的行写之前、写完之后各在哪里，仍旧要平。"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import rejected_rows
from etl_assets.orders.changed import IMPORT_IDS, KEY, ChangedOrders
from etl_assets.services.accounting import EXAMPLES, AccountingError, DayAccount
from etl_assets.services.day_accounts import STORE, StoredDay, values_to_store
from etl_assets.services.materialization import DataTransaction
from etl_assets.services.vectorized_queries import read_frame
from etl_assets.services.warned_rows import DayWarnings, warn_by_day

_DAY_OF_IMPORT = ["day", "import_id"]
_MOST_TYPES = 50


def carry_forward(
    transaction: DataTransaction, changed: ChangedOrders, superseded: pl.DataFrame, after: pl.DataFrame
) -> list[StoredDay]:
    """写完之后：手头的行此刻各在哪里，从表里读回来的，与写之前相比，记进这些天的账；返回这次运行的日子的，按日子排好。

    账上没有的导入（事件还没到），它的行现在不算，等着它的运行再算。手头的订单也有版本的别的日子，存着账的也接着记。

    :param superseded: 输掉的版本：raw_id、is_repeated。
    :param after: 写完之后 `rows_of_orders` 的。
    :raises AccountingError: 有一天不平。
    """
    target, days = transaction.target, transaction.days
    repeated = superseded.filter("is_repeated")["raw_id"].implode()
    versions = changed.rows.versions.with_columns(is_repeated=pl.col("raw_id").is_in(repeated))
    new = changed.arrived.join(changed.counted, on=_DAY_OF_IMPORT, how="anti")
    rejecting = changed.rows.rejected["import_id"].unique().to_list()
    rejected = _read_rejected(transaction, rejecting).join(new, on=_DAY_OF_IMPORT, how="semi")
    # 先前只算账上有的，现在连同新来的：新导入的行由此进账，重复的事件不会记两次
    was = _place(versions, changed.existing, changed.counted)
    now = _place(versions, after, pl.concat([changed.counted, new.select(changed.counted.columns)]))
    raw = dict(new.group_by("day").agg(pl.col("rows").sum()).iter_rows())
    span = DayRange(min(changed.stored), max(changed.stored))
    warned_before, warned_now = (warn_by_day(span, *_warned(placed)) for placed in (was, now))
    carried = {
        day: StoredDay(
            _carry_account(
                old.account,
                raw.get(day, 0),
                was.filter(order_date=day),
                now.filter(order_date=day),
                rejected.filter(pl.col("day") == day),
            ),
            _carry_warnings(old.warnings, warned_before.get(day), warned_now.get(day)),
            transaction.run.run_id if days.first <= day <= days.last else old.run_id,
        )
        for day, old in changed.stored.items()
    }
    if unbalanced := [day.account for day in carried.values() if day.account.difference]:
        lost = (
            now.filter(pl.col("place") == "lost", order_date=unbalanced[0].day)["raw_id"]
            .sort()
            .head(EXAMPLES)
            .to_list()
        )
        raise AccountingError([replace(unbalanced[0], lost_examples=lost), *unbalanced[1:]])
    if values := values_to_store(
        target, [new_day for day, new_day in carried.items() if new_day != changed.stored[day]], new
    ):
        transaction.defer(STORE, values)
    return [carried[day] for day in days]


def _read_rejected(transaction: DataTransaction, import_ids: list[str]) -> pl.DataFrame:
    if not import_ids:  # 几乎总是这样
        return pl.DataFrame(schema={"raw_id": pl.Int64, "import_id": pl.String, "day": pl.Date, "rule": pl.String})
    return read_frame(transaction.connection, _rejected_rows(transaction.target), {"import_ids": import_ids})


@lru_cache(maxsize=8)
def _rejected_rows(schema: str) -> sa.Select[Any]:
    rejected = rejected_rows.c
    return sa.select(*rejected["raw_id", "import_id", "day", "rule"]).where(
        rejected.target == schema, rejected.import_id == sa.any_(IMPORT_IDS), rejected.day.is_not(None)
    )


def _place(versions: pl.DataFrame, rows: pl.DataFrame, counted: pl.DataFrame) -> pl.DataFrame:
    """账上的版本各在哪里：loaded、superseded（它的订单在 orders 里是别的版本），或 lost。"""
    of_account = versions.join(counted, left_on=["order_date", "import_id"], right_on=_DAY_OF_IMPORT, how="semi")
    winner = pl.col("winner")
    is_winner = pl.when(winner == pl.col("raw_id")).then(pl.lit("loaded")).otherwise(pl.lit("superseded"))
    place = pl.when(winner.is_null()).then(pl.lit("lost")).otherwise(is_winner)
    return of_account.join(rows.select(*KEY, winner=pl.col("raw_id")), on=KEY, how="left").with_columns(place=place)


def _warned(placed: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    return placed.filter(pl.col("place") == "superseded"), placed.filter(pl.col("place") == "loaded", "is_unmapped")


def _carry_account(
    account: DayAccount, raw: int, was: pl.DataFrame, now: pl.DataFrame, rejected: pl.DataFrame
) -> DayAccount:
    change = {
        place: now.filter(place=place).height - was.filter(place=place).height for place in ("loaded", "superseded")
    }
    rules = Counter(dict(account.rejected))
    rules.update(dict(rejected.group_by("rule").len().iter_rows()))
    examples = dict(rejected.group_by("rule").agg("raw_id").iter_rows())
    return replace(
        account,
        raw=account.raw + raw,
        loaded=account.loaded + change["loaded"],
        superseded=account.superseded + change["superseded"],
        rejected=dict(rules),
        rejected_examples={
            rule: sorted({*account.rejected_examples.get(rule, ()), *examples.get(rule, ())})[:EXAMPLES]
            for rule in rules
        },
    )


def _carry_warnings(stored: DayWarnings | None, was: DayWarnings | None, now: DayWarnings | None) -> DayWarnings | None:
    """账上原有的，减去手头的先前的，加上手头的现在的。"""
    if was == now:
        return stored
    rows, types, examples = Counter[str](), Counter[str](), defaultdict[str, set[int]](set)
    for warnings, sign in ((stored, 1), (was, -1), (now, 1)):
        if warnings is None:
            continue
        rows.update({rule: sign * count for rule, count in warnings.rows.items()})
        types.update({name: sign * count for name, count in warnings.types.items()})
        for rule, raw_ids in warnings.examples.items():
            examples[rule] = examples[rule].union(raw_ids) if sign > 0 else examples[rule].difference(raw_ids)
    rows = +rows
    if not rows:
        return None
    return DayWarnings(
        rows=dict(rows),
        examples={rule: sorted(examples[rule])[:EXAMPLES] for rule in rows},
        types=dict((+types).most_common(_MOST_TYPES)),
    )
