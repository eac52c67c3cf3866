"""一列时刻的写法：年月日的先后、12 小时制、序列数，由整列的值定，不逐格猜。

只凭 03/04/2026 看不出是三月还是四月；同一列里有 13/04/2026 就看得出。
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar
from zoneinfo import ZoneInfo

import polars as pl

from bridge.imports.rules.errors import ColumnReading, ImportFileError, SeenCell
from bridge.imports.rules.typography import to_ascii

_Way = TypeVar("_Way", bound="str | frozenset[DateOrder]")

DateOrder = Literal["day-first", "month-first", "year-first"]
_Clock = Literal["12", "24"]
_Kind = Literal["year", "parts", "serial", "seconds", "milliseconds"]

INSTANT = pl.Datetime("us", "UTC")
# chrono 也接受 "24/1/5" 那样的年份；表格里只有钟点的单元格是 1899 年或 1904 年的
_FIRST_YEAR = 1905
_DAYS_FROM_1899, _DAYS_FROM_1904 = 25_569, 24_107

_USUAL = "%Y-%m-%d %H:%M:%S"
_YEAR_FIRST = ("%Y-%m-%d %H:%M", "%Y-%m-%d")
_NO_TIME = r"^[-—–/]+$"  # 抖店把没有的时间写成 -

_MARKER = r"(?:上午|下午|[AaPp]\.?[Mm]\.?)"
_DATE = (
    r"(?:(?P<y>[0-9]{4})(?:[-/.]|年)(?P<m>[0-9]{1,2})(?:[-/.]|月)(?P<d>[0-9]{1,2})日?"
    r"|(?P<a>[0-9]{1,2})(?:[-/]|(?P<dot>\.))(?P<b>[0-9]{1,2})[-/.](?P<c>[0-9]{4}|[0-9]{1,2}))"
)
_CLOCK = (
    rf"(?P<before>{_MARKER})? ?(?P<hour>[0-9]{{1,2}}):(?P<minute>[0-9]{{2}})"
    rf"(?::(?P<second>[0-9]{{2}})(?:[.,](?P<fraction>[0-9]{{1,9}}))?)? ?(?P<after>{_MARKER})?"
)
_OFFSET = r"(?P<offset>Z|UTC|GMT|(?:UTC|GMT)?[+-](?:0[0-9]|1[0-5])(?::?[0-5][0-9])?)"
_WRITTEN = rf"^{_DATE}(?:(?:T|,? ){_CLOCK}(?: ?{_OFFSET})?)?$"
_NUMBERS: dict[_Kind, str] = {
    "serial": r"^[1-9][0-9]{4}(?:\.[0-9]+)?$",
    # 到 2033 年为止：2026030209 是写成数的日期与钟点
    "seconds": r"^1[0-9]{9}(?:\.[0-9]+)?$",
    "milliseconds": r"^1[0-9]{12}$",
}
_KIND_NAMES: dict[_Kind, str] = {
    "year": "a date that begins with a four-digit year",
    "parts": "a date in another order",
    "serial": "an Excel serial number",
    "seconds": "Unix seconds",
    "milliseconds": "Unix milliseconds",
}
_CLOCK_NAMES: dict[_Clock, str] = {"12": "a time with AM or PM", "24": "a time without"}
_REPORTED: dict[_Kind, str] = {
    "serial": "Excel serial numbers (days since {epoch})",
    "seconds": "Unix seconds",
    "milliseconds": "Unix milliseconds",
}
_ORDERS: dict[DateOrder, tuple[str, str, str]] = {
    "day-first": ("c", "b", "a"),
    "month-first": ("c", "a", "b"),
    "year-first": ("a", "b", "c"),
}


@dataclass(frozen=True)
class SeenTimes:
    """一列在一块里的值：usual 是按平常写法已经读出的当地时刻；others 是其余的，每行一个，position 是它在块里的位置。"""

    rows: pl.Series
    text: pl.Series
    usual: pl.Series
    others: pl.DataFrame


class TimeColumn:
    """一列时刻：逐块看过去，记下见过的每种写法的第一个单元格，与还可能的日期先后。

    :param given: 人说了日期的先后；那就不找，不合的值是坏行。
    :param starts_1904: 序列数从 1904 年数起。
    """

    def __init__(self, path: Path, column: str, given: DateOrder | None, *, starts_1904: bool = False) -> None:
        self.column = column
        self._starts_1904 = starts_1904
        self._path = path
        self._given = given
        self._kinds: dict[_Kind, SeenCell] = {}
        self._clocks: dict[_Clock, SeenCell] = {}
        self._ruled_out: dict[DateOrder, SeenCell] = {}
        self._differ: dict[frozenset[DateOrder], SeenCell] = {}
        self._short_year: SeenCell | None = None

    @property
    def is_open(self) -> bool:
        return self._given is None and self._open_pair() is not None

    @property
    def order(self) -> DateOrder:
        return self._given if self._given is not None else self._possible()[0]

    def observe(self, rows: pl.Series, text: pl.Series) -> SeenTimes:
        """看一块。

        :raises ImportFileError: 一列里有两种写法。
        """
        text = text.str.strip_chars()
        usual = read_year_first(text)
        missing = usual.is_null() & text.is_not_null()
        others = _take_apart(text, missing) if missing.any() else pl.DataFrame()
        self._note_usual(rows, text, usual)
        if others.height:
            self._weigh(others.with_columns(rows.gather(others["position"]).alias("row")))
        self._refuse_two(self._kinds, _KIND_NAMES)
        self._refuse_two(self._clocks, _CLOCK_NAMES)
        return SeenTimes(rows, text, usual, others)

    def read(self, seen: SeenTimes, time_zone: str) -> tuple[pl.Series, pl.Series]:
        """UTC 时刻（读不出的是 NULL）与当地时刻：前者没有而后者有的，是那个时区里没有或有两次的时刻。"""
        local, instants = seen.usual, localize(seen.usual, time_zone)
        others = seen.others
        if not others.height:
            return instants, local
        table = others.select(
            "kind", "tidy", _offset_minutes().alias("minutes"), _assemble(others, self.order).alias("written")
        )
        zoned = pl.col("minutes").is_not_null()
        counted = pl.col("kind").is_in(["seconds", "milliseconds"])
        counted_up = _count_up(_DAYS_FROM_1904 if self._starts_1904 else _DAYS_FROM_1899)
        naive = table.select(
            pl.coalesce(pl.when(~zoned).then("written"), pl.when(~counted).then(counted_up))
        ).to_series()
        exact = table.select(
            pl.coalesce(
                pl.when(zoned).then(pl.col("written") - pl.duration(minutes="minutes")),
                pl.when(counted).then(counted_up),
            )
        ).to_series()
        in_zone = localize(naive, time_zone)
        read = in_zone.zip_with(in_zone.is_not_null(), exact.dt.replace_time_zone("UTC"))
        return instants.clone().scatter(others["position"], read), local.clone().scatter(others["position"], naive)

    def expected(self) -> str:
        """坏行的消息里：该怎样写。"""
        if "parts" in self._kinds:
            return f"written {self.order}"
        return next(
            (f"as {self._name(kind)}" for kind in _REPORTED if kind in self._kinds), "such as 2024-01-31 08:05:00"
        )

    def is_blank(self, seen: SeenTimes) -> pl.Series:
        return seen.text.str.contains(_NO_TIME)

    def ask(self) -> ImportFileError:
        """值里看不出来，要人说。"""
        _, cell = self._open_pair() or (frozenset(), SeenCell(0, ""))
        table = _take_apart(pl.Series([cell.value]), pl.Series([True]))
        days = {order: _assemble(table, order).dt.to_string("%Y-%m-%d")[0] for order in self._possible()}
        readings = [f"{day} {order}" for order, day in days.items() if day]
        return ImportFileError(
            self._path,
            f"is {' and '.join(readings)}, and no value of the column tells which it is",
            row=cell.row,
            column=self.column,
            value=cell.value,
            advice=f"say {' or '.join(f'--{order}' for order, day in days.items() if day)} (in a profile: date_order of ordered_at)",
        )

    def describe(self) -> list[ColumnReading]:
        """选了什么，为什么；年在最前、24 小时制的不必说。"""
        found: list[ColumnReading] = []
        for kind, cell in self._kinds.items():
            if kind == "parts":
                other: DateOrder = "month-first" if self.order == "day-first" else "day-first"
                because = None if self._given else self._ruled_out.get(other, cell)
                found.append(ColumnReading(self.column, f"dates {self.order}", because))
            elif kind != "year":
                found.append(ColumnReading(self.column, f"times as {self._name(kind)}", cell))
        if "12" in self._clocks:
            found.append(ColumnReading(self.column, "a 12-hour clock", self._clocks["12"]))
        if self._short_year is not None:
            found.append(ColumnReading(self.column, "two-digit years as 1969 to 2068", self._short_year))
        return found

    def _name(self, kind: _Kind) -> str:
        return _REPORTED[kind].format(epoch="1904-01-01" if self._starts_1904 else "1899-12-30")

    def _possible(self) -> list[DateOrder]:
        return [order for order in _ORDERS if order not in self._ruled_out]

    def _open_pair(self) -> tuple[frozenset[DateOrder], SeenCell] | None:
        possible = frozenset(self._possible())
        return next(((pair, cell) for pair, cell in self._differ.items() if pair <= possible), None)

    def _note_usual(self, rows: pl.Series, text: pl.Series, usual: pl.Series) -> None:
        if "year" in self._kinds and "24" in self._clocks:
            return
        frame = pl.DataFrame({"row": rows, "text": text}).filter(usual.is_not_null())
        self._note(self._kinds, "year", frame)
        self._note(self._clocks, "24", frame.filter(pl.col("text").str.contains(":", literal=True)))

    def _weigh(self, others: pl.DataFrame) -> None:
        for kind in _KIND_NAMES:
            self._note(self._kinds, kind, others.filter(pl.col("kind") == kind))
        marked = pl.coalesce("before", "after").is_not_null()
        self._note(self._clocks, "12", others.filter(marked))
        self._note(self._clocks, "24", others.filter(pl.col("hour").is_not_null(), ~marked))
        parts = others.filter(pl.col("kind") == "parts")
        if parts.height:
            self._weigh_orders(parts)

    def _weigh_orders(self, parts: pl.DataFrame) -> None:
        """每个值排除读不通的先后；哪个先后都读不通的是坏行，不作数。"""
        if self._short_year is None:
            short = parts.filter(pl.col("c").str.len_chars() <= 2)
            self._short_year = SeenCell(*short.select("row", "text").row(0)) if short.height else None
        if self._given is not None:
            return
        readings = {order: _assemble(parts, order) for order in _ORDERS}
        cells = parts.select("row", "text", **{order: values.dt.date() for order, values in readings.items()})
        readable = cells.filter(pl.any_horizontal(pl.col(order).is_not_null() for order in _ORDERS))
        for order in _ORDERS:
            self._note(self._ruled_out, order, readable.filter(pl.col(order).is_null()))
        for first, second in combinations(_ORDERS, 2):
            self._note(self._differ, frozenset({first, second}), readable.filter(pl.col(first) != pl.col(second)))
        if not self._possible():
            before, last = sorted(set(self._ruled_out.values()))[-2:]
            raise self._two_ways(before, last, "cannot be read in the order of day and month of", "")

    def _note(self, found: dict[_Way, SeenCell], key: _Way, cells: pl.DataFrame) -> None:
        if key not in found and cells.height:
            found[key] = SeenCell(*cells.select("row", "text").row(0))

    def _refuse_two(self, found: dict[_Way, SeenCell], names: dict[_Way, str]) -> None:
        if len(found) > 1:
            (one, first), (other, second) = sorted(found.items(), key=lambda item: item[1].row)[:2]
            raise self._two_ways(first, second, f"is read as {names[other]}, but", f" as {names[one]}")

    def _two_ways(self, first: SeenCell, second: SeenCell, relation: str, end: str) -> ImportFileError:
        return ImportFileError(
            self._path,
            f"{relation} {first.value!r} in row {first.row}{end}",
            row=second.row,
            column=self.column,
            value=second.value,
            advice="write the column in one way (a spreadsheet may have turned some of its dates into others: export again),"
            " or give the format in a profile",
        )


def read_format(text: pl.Series, time_format: str) -> pl.Series:
    """按 strptime 写法读；读不出的是 NULL。"""
    parsed = text.str.to_datetime(time_format, strict=False, time_unit="us")
    usable = (parsed.dt.year() >= _FIRST_YEAR) & ~text.str.contains(":60", literal=True)
    if " " in time_format:
        # chrono 当作可有可无，2026-1-115:30 就不知道是几日
        usable &= text.str.contains(" ", literal=True)
    if re.search(r"%[A-Za-z]%[A-Za-z]", time_format):
        # 20240105 那样连写的，少一位也会被读成别的日子：写回去要一样
        usable &= parsed.dt.strftime(time_format) == text
    return parsed.zip_with(usable.fill_null(value=False), pl.Series([None], dtype=parsed.dtype))


def localize(times: pl.Series, time_zone: str) -> pl.Series:
    """没有时区的当作这个时区的；那里没有的、有两次的是 NULL。"""
    if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is not None:
        return times.dt.convert_time_zone("UTC").cast(INSTANT)
    local = times.dt.replace_time_zone(time_zone, ambiguous="null", non_existent="null")
    return local.dt.convert_time_zone("UTC")


def describe_clock_change(local: datetime, time_zone: str) -> str:
    """当地没有或有两次的时刻：说出它的两种读法。"""
    zone = ZoneInfo(time_zone)
    earlier, later = (
        local.replace(tzinfo=zone, fold=fold).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for fold in (0, 1)
    )
    if earlier < later:
        return f"exists twice in {time_zone}, where clocks go back: it is {earlier} or {later}"
    return f"does not exist in {time_zone}, where clocks go forward: {later} or {earlier} may be meant"


def read_year_first(text: pl.Series) -> pl.Series:
    """2026-03-02 09:05:00、2026/3/2 9:05、2026-03-02T09:05:00、2026-03-02：常见，所以不走逐字的正则。"""
    found = pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, text.len())
    # 第一个值用的是斜线，就不必白试一遍
    if text.head(1).str.contains("-", literal=True).any():
        found = read_format(text, _USUAL)
    if found.null_count() == text.null_count():
        return found
    plain = text.str.replace_all("/", "-", literal=True)
    if plain.str.contains("T", literal=True).any():
        plain = plain.str.replace(r"^([0-9-]+)T", "$1 ")
    for time_format in (_USUAL, *_YEAR_FIRST):
        if not (found.is_null() & plain.is_not_null()).any():
            break
        missing = plain.zip_with(found.is_null(), pl.Series([None], dtype=pl.String))
        found = found.zip_with(found.is_not_null(), read_format(missing, time_format))
    return found


def _take_apart(text: pl.Series, missing: pl.Series) -> pl.DataFrame:
    """其余的值各拆成年月日、时分秒与时差；kind 是 NULL 的不是时刻。"""
    position = missing.fill_null(value=False).arg_true()
    original = text.gather(position)
    tidy = to_ascii(original).str.replace_all("日|上午|下午", " ${0} ").str.strip_chars().str.replace_all(r"\s+", " ")
    tidy = tidy.str.replace(" 日", "日", literal=True)
    groups = tidy.str.extract_groups(_WRITTEN).struct.unnest()
    kind = pl.when(groups["y"].is_not_null()).then(pl.lit("year")).when(groups["a"].is_not_null()).then(pl.lit("parts"))
    for name, pattern in _NUMBERS.items():
        kind = kind.when(tidy.str.contains(pattern)).then(pl.lit(name))
    return groups.select(
        position.alias("position"),
        original.alias("text"),
        tidy.alias("tidy"),
        kind.otherwise(None).alias("kind"),
        pl.all(),
    )


def _assemble(parts: pl.DataFrame, order: DateOrder) -> pl.Series:
    """拆开的各段 → 当地时刻（不管时差）；没有这个日子、这个钟点的是 NULL。"""
    year_part, month_part, day_part = _ORDERS[order]
    dotted = pl.col("dot").is_not_null()
    short = pl.col(year_part)
    long = pl.when(short.cast(pl.Int64) < 69).then(pl.lit("20") + short).otherwise(pl.lit("19") + short)
    written_year = (
        pl.when(short.str.len_chars() == 4).then(short).otherwise(pl.when(short.str.len_chars() == 2).then(long))
    )
    # 用点分开的没有月在前的：dd.mm.yyyy、yy.mm.dd
    usable = pl.when((pl.col("c").str.len_chars() <= 2) | pl.lit(order != "year-first")).then(written_year)
    year = pl.coalesce("y", pl.when(~dotted | pl.lit(order != "month-first")).then(usable))
    month, day = pl.coalesce("m", month_part), pl.coalesce("d", day_part)
    hour = pl.col("hour").cast(pl.Int64)
    marker = pl.coalesce("before", "after").str.to_lowercase()
    afternoon = marker.str.starts_with("p") | (marker == "下午")
    twelve = pl.when(hour.is_between(1, 12)).then(hour % 12 + pl.when(afternoon).then(12).otherwise(0))
    both = pl.col("before").is_not_null() & pl.col("after").is_not_null()
    on_the_clock = pl.when(both).then(None).when(marker.is_not_null()).then(twelve).otherwise(hour)
    text = pl.format(
        "{}-{}-{} {}:{}:{}.{}",
        year,
        month,
        day,
        pl.when(pl.col("hour").is_null()).then(0).otherwise(on_the_clock),
        pl.col("minute").fill_null("00"),
        pl.col("second").fill_null("00"),
        pl.col("fraction").fill_null("0"),
    )
    return read_format(parts.select(text.alias("text")).to_series(), "%Y-%m-%d %H:%M:%S%.f")


def _offset_minutes() -> pl.Expr:
    """Z、+0900、UTC-08:30 → 分钟；没写时差的是 NULL。"""
    digits = pl.col("offset").str.replace_all("[^0-9+-]", "")
    hours = digits.str.slice(0, 3).cast(pl.Int64, strict=False).fill_null(0)
    minutes = digits.str.slice(3).cast(pl.Int64, strict=False).fill_null(0)
    signed = pl.when(digits.str.starts_with("-")).then(-minutes).otherwise(minutes)
    return pl.when(pl.col("offset").is_not_null()).then(hours * 60 + signed)


def _count_up(days_before_1970: int) -> pl.Expr:
    """序列数与 Unix 时间 → 时刻。序列数精确到毫秒，表格软件也只到毫秒。"""
    number, kind = pl.col("tidy").cast(pl.Float64, strict=False), pl.col("kind")
    days = (number * 86_400_000).round().cast(pl.Int64) * 1000 - days_before_1970 * 86_400_000_000
    microseconds = (
        pl.when(kind == "serial")
        .then(days)
        .when(kind == "seconds")
        .then((number * 1_000_000).round().cast(pl.Int64))
        .when(kind == "milliseconds")
        .then((number * 1000).cast(pl.Int64))
    )
    return microseconds.cast(pl.Datetime("us"))
