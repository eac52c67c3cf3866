"""时刻：以 1970 年起的秒数（Decimal）表示，这样无穷大与公元前也是普通的、可比较的值。"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

Instant = Decimal

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_SECONDS = 86_400
# 公历 400 年一循环，日数与星期都重复，时区的规则也随之重复
_CYCLE_YEARS = 400
_CYCLE_SECONDS = 146_097 * _DAY_SECONDS
_FIRST_YEAR_START = Decimal(-62_135_596_800)  # 0001-01-01T00:00Z
_LAST_YEAR_END = Decimal(253_402_300_800)  # 10000-01-01T00:00Z


def to_instant(moment: datetime) -> Instant:
    difference = moment - _EPOCH
    return Decimal(difference.days * _DAY_SECONDS + difference.seconds) + Decimal(difference.microseconds) / 1_000_000


def to_datetime(instant: Instant) -> datetime | str:
    """UTC 的 datetime；Python 装不下的时刻是一段文字。"""
    if instant.is_infinite():
        return "infinity" if instant > 0 else "-infinity"
    try:
        return _EPOCH + timedelta(microseconds=int(instant * 1_000_000))
    except OverflowError:
        return f"{instant} seconds from 1970"


def business_day(instant: Instant, zone: ZoneInfo) -> date | None:
    """在时区里的日历日；无穷大与当地公元 1 到 9999 年以外的时刻没有。

    两端各两天里，UTC 的年份与当地的年份可以不同，而 datetime 只有 1 到 9999 年：先挪进一个循环再换算。
    """
    margin = 2 * _DAY_SECONDS
    if not _FIRST_YEAR_START - margin <= instant <= _LAST_YEAR_END + margin:
        return None
    cycles = 1 if instant < _FIRST_YEAR_START + margin else -1 if instant > _LAST_YEAR_END - margin else 0
    moved = _EPOCH + timedelta(microseconds=int((instant + cycles * _CYCLE_SECONDS) * 1_000_000))
    local = moved.astimezone(zone)
    year = local.year - cycles * _CYCLE_YEARS
    return date(year, local.month, local.day) if 1 <= year <= 9999 else None
