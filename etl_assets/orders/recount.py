"""存着的账对不对：从表里重新数一遍，一次几十天，内存与语句都有界。接着算的账由它每晚证明。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound, local_day, may_fall_on_days
from etl_assets.core.etl_tables import counted_imports, day_accounts, import_events, ledger, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, target_tables
from etl_assets.services.raw_rows import IN_SCOPE
from etl_assets.services.vectorized_queries import read_frame

_DAYS_PER_BITE = 31


def find_wrong_days(snapshot: sa.Connection, settings: EtlSettings, days: DayRange | None = None) -> list[date]:
    """账与表不符的日子；到期的、没有账的、后来由不记账的旧版本做过的、份额之外也有行的不看。

    :param snapshot: 整段是同一个快照，运行正写着的账才与它写的行一致。
    :param days: 只看这些天；None 是全部有账的日子。
    """
    return [day for bite in _bites(snapshot, settings, days) for day in _wrong_days(snapshot, settings, bite)]


def _bites(snapshot: sa.Connection, settings: EtlSettings, days: DayRange | None) -> Iterator[DayRange]:
    if days is None:
        of_target = day_accounts.c.target == settings.target_schema
        accounted = sa.select(sa.func.min(day_accounts.c.day), sa.func.max(day_accounts.c.day)).where(of_target)
        first, last = snapshot.execute(accounted).one()
        if first is None:
            return
        days = DayRange(first, last)
    yield from days.in_bites(_DAYS_PER_BITE)


def _wrong_days(snapshot: sa.Connection, settings: EtlSettings, days: DayRange) -> list[date]:
    stored = read_frame(snapshot, _stored(settings.target_schema), bound(days))
    if stored.is_empty():
        return []
    wrong = pl.lit(value=False)
    for name, statement in _counts(settings.target_schema, settings.timezone).items():
        stored = stored.join(
            read_frame(snapshot, statement, bound(days)).rename({"rows": f"{name}_now"}), on="day", how="left"
        )
        wrong |= pl.col(f"{name}_now").fill_null(0) != pl.col(name)
    return stored.filter(wrong)["day"].sort().to_list()


# ---- 语句只拼一次 -----------------------------------------------------------------


@lru_cache(maxsize=8)
def _stored(schema: str) -> sa.Select[Any]:
    account = day_accounts.c.account
    rejected = sa.select(sa.func.sum(sa.cast(sa.column("value"), sa.BigInteger))).select_from(
        sa.func.jsonb_each_text(account["rejected"]).table_valued("key", "value", name="rule")
    )
    of_day = sa.and_(ledger.c.target == schema, ledger.c.asset == "orders", ledger.c.day == day_accounts.c.day)
    is_its_run = sa.and_(ledger.c.requested == ledger.c.materialized, ledger.c.run_id == account["run_id"].astext)
    stands = sa.select(ledger.c.day).where(of_day, is_its_run)
    return sa.select(
        day_accounts.c.day,
        *[sa.cast(account[name].astext, sa.BigInteger).label(name) for name in ("raw", "loaded")],
        sa.func.coalesce(rejected.correlate(day_accounts).scalar_subquery(), 0, type_=sa.BigInteger).label("rejected"),
    ).where(
        day_accounts.c.target == schema,
        day_accounts.c.day.between(FIRST_DAY, LAST_DAY),
        sa.cast(account["outside"].astext, sa.BigInteger) == 0,
        stands.exists(),
    )


@lru_cache(maxsize=8)
def _counts(schema: str, timezone: str) -> Mapping[str, sa.Select[Any]]:
    """一天一行：账上该有的导入（事件处理过的）的原始行，账上的导入装入的、拒收的。被取代的是其余的。"""
    orders = target_tables(schema).orders.c
    raw = (
        sa.select(local_day(raw_orders.c.ordered_at, timezone).label("day"), raw_orders.c.import_id)
        .where(may_fall_on_days(raw_orders.c.ordered_at))
        .subquery("raw")
    )
    is_counted, is_handled = _is_counted(schema, raw), import_events.c.import_id == raw.c.import_id
    handled = (
        sa.select(import_events.c.import_id)
        .join(import_tasks, import_tasks.c.import_id == import_events.c.import_id)
        .where(import_events.c.target == schema, is_handled, IN_SCOPE)
    )
    counted = sa.select(counted_imports.c.rows).where(is_counted)
    of_days = raw.c.day.between(FIRST_DAY, LAST_DAY)
    loaded = sa.select(orders.order_date.label("day"), orders.import_id).where(
        orders.order_date.between(FIRST_DAY, LAST_DAY)
    )
    rejected = sa.select(rejected_rows.c.day, rejected_rows.c.import_id).where(
        rejected_rows.c.target == schema, rejected_rows.c.day.between(FIRST_DAY, LAST_DAY)
    )
    return {
        "raw": sa.select(raw.c.day, sa.func.count().label("rows"))
        .where(of_days, sa.or_(counted.exists(), handled.exists()))
        .group_by(raw.c.day),
        "loaded": _of_account(schema, loaded.subquery("loaded")),
        "rejected": _of_account(schema, rejected.subquery("rejected")),
    }


def _of_account(schema: str, rows: sa.FromClause) -> sa.Select[Any]:
    return (
        sa.select(rows.c.day, sa.func.count().label("rows"))
        .join(counted_imports, _is_counted(schema, rows))
        .group_by(rows.c.day)
    )


def _is_counted(schema: str, rows: sa.FromClause) -> sa.ColumnElement[bool]:
    same = sa.and_(counted_imports.c.day == rows.c.day, counted_imports.c.import_id == rows.c.import_id)
    return sa.and_(same, counted_imports.c.target == schema)
