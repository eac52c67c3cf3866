"""一个区间太大，就一段一段地做：内存随行数而长，语句有时限。一段就是一次完整的物化，台账也一段一段地记。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import lru_cache, wraps
from typing import Any, TypeAlias

import sqlalchemy as sa

from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound, local_day
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import StatementTimeoutError
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import raw_orders
from etl_assets.services.materialization import AssetReport, RunContext
from etl_assets.services.vectorized_queries import WriteCounts

logger = get_logger(__name__)
Materialize: TypeAlias = Callable[[sa.Engine, EtlSettings, DayRange, RunContext], AssetReport]

ROWS_PER_PART = 1_000_000
"""一段至多这么多原始行，除非一天就不止：一百万行占约 0.5 GiB。"""


def in_parts(materialize: Materialize) -> Materialize:
    """把区间切成若干段，依次物化；超过语句时限的对半再切。

    前面几段提交了，后面的失败，就只有后面的还到期。

    :raises StatementTimeoutError: 一天自己就超过了时限。
    """

    @wraps(materialize)
    def parted(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
        waiting, reports = [days], []
        while waiting:
            part, *rest = split_by_rows(engine, settings, waiting.pop(0))
            waiting = [*rest, *waiting]
            try:
                reports.append(materialize(engine, settings, part, run))
            except StatementTimeoutError as error:
                # 时限多半是因为大：不先减半，重试五次都是同样地超时，然后搁置
                waiting = [*halve(part, error), *waiting]
        return merge(days, reports)

    return parted


def split_by_rows(engine: sa.Engine, settings: EtlSettings, days: DayRange) -> list[DayRange]:
    """头一段，与剩下的（没有就没有）：头一段的原始行不超过 ROWS_PER_PART，至少一天。只有一天的不必问。

    往后数到第 ROWS_PER_PART 行就停，所以读的索引也不超过这么多。
    """
    if len(days) == 1:
        return [days]
    row = {**bound(days), "rows": ROWS_PER_PART}
    overflowing: date | None = transact(engine, sa.Connection.scalar, _day_of_row(settings.timezone), row)
    return [days] if overflowing is None else _cut(days, overflowing)


def halve(days: DayRange, error: StatementTimeoutError) -> list[DayRange]:
    """两半；一天没有两半。"""
    if len(days) == 1:
        raise StatementTimeoutError(
            f"{days} alone takes longer than ETL_STATEMENT_TIMEOUT_SECONDS allows, nothing was written: raise it, then run "
            f"`etl backfill --from {days.first} --to {days.last}` ({error})"
        ) from error
    logger.warning("a statement timed out, trying half of the days", partition=str(days))
    return _cut(days, days.first + timedelta(days=len(days) // 2))


def merge(days: DayRange, reports: Sequence[AssetReport]) -> AssetReport:
    """几段合成一次。"""
    first, *others = reports
    if not others:
        return first
    return replace(
        first,
        days=days,
        scope="whole" if any(report.scope == "whole" for report in reports) else "changed",
        whole_because=next((report.whole_because for report in reports if report.whole_because), None),
        rejected=sum(report.rejected for report in reports),
        written=sum((report.written for report in reports), WriteCounts()),
        duration_seconds=sum(report.duration_seconds for report in reports),
        accounts=[account for report in reports for account in report.accounts],
        warnings={day: warnings for report in reports for day, warnings in report.warnings.items()},
    )


def _cut(days: DayRange, day: date) -> list[DayRange]:
    """在这一天之前切开；它是头一天就在它之后。"""
    second = max(day, days.first + timedelta(days=1))
    return [DayRange(days.first, second - timedelta(days=1)), DayRange(second, days.last)]


@lru_cache(maxsize=8)
def _day_of_row(timezone: str) -> sa.Select[Any]:
    """从 FIRST_DAY 起，按时刻排的第 rows 行（从 0 数）在哪一天；到 LAST_DAY 也没有那么多行就没有。不论导入的状态。"""
    ordered_at = raw_orders.c.ordered_at
    first, after = (sa.func.timezone(timezone, sa.cast(day, sa.TIMESTAMP())) for day in (FIRST_DAY, LAST_DAY + 1))
    in_days = sa.select(ordered_at).where(ordered_at >= first, ordered_at < after).order_by(ordered_at)
    row = in_days.offset(sa.bindparam("rows", type_=sa.BigInteger)).limit(1).subquery("row")
    return sa.select(local_day(row.c.ordered_at, timezone))
