"""业务日：ETL_TIMEZONE 里的日历日，以及连续业务日的区间。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import psycopg
import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.errors import DatabaseRefusedError, PermanentError
from etl_assets.core.settings import EtlSettings


@dataclass(frozen=True, order=True)
class DayRange:
    """从 first 到 last 的业务日，两端都含。"""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise PermanentError(f"the day range {self.first}..{self.last} is reversed: give the earlier day first")

    def __iter__(self) -> Iterator[date]:
        return (self.first + timedelta(days=offset) for offset in range(len(self)))

    def __len__(self) -> int:
        return (self.last - self.first).days + 1

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}..{self.last}"

    def in_bites(self, days: int) -> Iterator[DayRange]:
        """一段一段，每段至多这么多天。"""
        for offset in range(0, len(self), days):
            first = self.first + timedelta(days=offset)
            yield DayRange(first, min(self.last, first + timedelta(days=days - 1)))

    def includes(self, day: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """SQL 条件：这一列的日子在区间里。"""
        return sa.and_(day >= self.first, day <= self.last)


def partition_range(settings: EtlSettings) -> DayRange:
    """此刻存在的全部分区：ETL_PARTITIONS_START 到今天。"""
    return DayRange(settings.partitions_start, max(settings.today(), settings.partitions_start))


def first_shown_day(settings: EtlSettings, oldest: date) -> date:
    """网页上的第一个分区：最早的数据那一年的元旦。昨天总在其中，每晚要重做它。"""
    first = min(oldest, settings.today() - timedelta(days=1)).replace(month=1, day=1)
    return max(first, settings.partitions_start)


def contiguous_ranges(days: Iterable[date]) -> list[DayRange]:
    """这些日子，连续的合成一段，早的在前。"""
    ranges: list[DayRange] = []
    for day in sorted(set(days)):
        if ranges and day == ranges[-1].last + timedelta(days=1):
            ranges[-1] = DayRange(ranges[-1].first, day)
        else:
            ranges.append(DayRange(day, day))
    return ranges


_CLOCKS = (
    "SELECT at, timezone(%s::text, at) FROM generate_series(now() - interval '1 year', now(), interval '1 month') AS at"
)


def assert_same_zone(connection: psycopg.Connection[Any], settings: EtlSettings) -> None:
    """ETL_TIMEZONE 在服务器与在 Python（Dagster 的分区）是不是同一个时区，看过去一年里各月的钟。

    CET、MET 这样的名字，PostgreSQL 先当缩写，没有夏令时；时区数据太旧的也会不同。

    :raises DatabaseRefusedError: 不是；日子会算错。
    """
    remedy = "name it by area and city, such as Europe/Berlin, and make the days again with `etl backfill`"
    try:
        clocks = connection.execute(_CLOCKS, [settings.timezone]).fetchall()
    except psycopg.errors.InvalidParameterValue as error:
        raise DatabaseRefusedError(f"PostgreSQL does not know ETL_TIMEZONE={settings.timezone}: {remedy}") from error
    for at, of_server in clocks:
        ours = at.astimezone(settings.zone).replace(tzinfo=None)
        if ours != of_server:
            raise DatabaseRefusedError(
                f"ETL_TIMEZONE={settings.timezone} is another time zone to PostgreSQL ({at:%Y-%m-%d %H:%M} UTC is {of_server:%H:%M}) "
                f"than to Python ({ours:%H:%M}): {remedy}; if it is such a name, update the time zone data of the older of the two"
            )


def local_day(timestamp: sa.ColumnElement[Any], timezone: str) -> sa.ColumnElement[Any]:
    """SQL：时刻在业务时区里的日期；无穷大与公元 1 到 9999 年以外的时刻没有业务日，是 NULL。

    边界先比较再换算：极端的时刻一换时区就溢出报错。
    """
    earliest = sa.func.timezone(timezone, sa.cast("0001-01-01 00:00:00", sa.TIMESTAMP()))
    latest = sa.func.timezone(timezone, sa.cast("10000-01-01 00:00:00", sa.TIMESTAMP()))
    in_years = sa.and_(timestamp >= earliest, timestamp < latest)
    return sa.case((in_years, sa.cast(sa.func.timezone(timezone, timestamp), sa.Date)))


FIRST_DAY, LAST_DAY = sa.bindparam("first_day", type_=sa.Date), sa.bindparam("last_day", type_=sa.Date)
"""语句里的区间：语句只拼一次，每次执行用 `bound(days)` 填上。"""


def bound(days: DayRange) -> Mapping[str, date]:
    return {"first_day": days.first, "last_day": days.last}


def may_fall_on_days(timestamp: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """SQL：FIRST_DAY 到 LAST_DAY 两边各放宽一天的时刻范围，能用 ordered_at 上的索引；精确的日子再由 local_day 判断。"""
    # 时区离 UTC 不到一天，放宽一天就够；边界按 UTC 写，时区怎样改钟都不相干
    return sa.and_(timestamp >= _midnight(FIRST_DAY - 1), timestamp < _midnight(LAST_DAY + 2))


def may_fall_off_days(timestamp: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """SQL：同 may_fall_on_days，反过来：两边各收窄一天之外的时刻。"""
    return sa.or_(timestamp < _midnight(FIRST_DAY + 1), timestamp >= _midnight(LAST_DAY))


def _midnight(day: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.timezone("UTC", sa.cast(day, sa.TIMESTAMP()))
