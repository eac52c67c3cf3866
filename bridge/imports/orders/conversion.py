"""文字变成金额、数量与时刻；读不出的是坏行，不猜也不当作空。"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from bridge.imports.rules.numbers import NumberColumn, SeenNumbers, read_exact
from bridge.imports.rules.problems import PROBLEMS, find_problems
from bridge.imports.rules.profile import ROW_NUMBER, AmountTarget
from bridge.imports.rules.times import (
    SeenTimes,
    TimeColumn,
    describe_clock_change,
    localize,
    read_format,
    read_year_first,
)

# 小数最多 16 位、整数最多 22 位；表格软件里的数最多 15 位有效数字
NUMBER = pl.Decimal(38, 16)
# 表达式里的数：两个数相乘时小数位相加，总共 38 位要够用
EXPRESSION_NUMBER = pl.Decimal(38, 6)
AMOUNT_LIMIT = 10**12  # numeric(14,2)
INTEGER_LIMIT = 2**31
_EXPRESSION_NUMBER = r"^-?[0-9]{1,12}(?:\.[0-9]{0,6})?$"


def convert_numbers(
    raw: pl.DataFrame, name: str, column: str, reading: NumberColumn, seen: SeenNumbers | None
) -> tuple[pl.Series, pl.DataFrame]:
    """金额、数量的一列 → 精确的数，与读不出的行；全是空白的是 NULL。

    还是 NUMBER：先汇总，再由 finish_amount、finish_quantity 收尾。
    """
    values = raw[name]
    if values.dtype.is_integer() or values.dtype.is_decimal():
        return values.cast(NUMBER, strict=False), pl.DataFrame(schema=PROBLEMS)
    written = reading.read(seen) if seen else read_exact(values.cast(pl.String))
    numbers = written.cast(NUMBER, strict=False)
    unreadable = _find_unreadable(raw, name, numbers, column, reading.problem())
    if unreadable.height:
        too_large = raw[ROW_NUMBER].filter(written.is_not_null() & numbers.is_null())
        problem = (
            pl.when(pl.col(ROW_NUMBER).is_in(too_large.implode())).then(pl.lit("is too large")).otherwise("problem")
        )
        unreadable = unreadable.with_columns(problem.alias("problem"))
    return numbers, unreadable


def read_expression_numbers(
    cells: pl.DataFrame, name: str, reading: NumberColumn, seen: SeenNumbers
) -> tuple[pl.Series, pl.DataFrame]:
    """表达式要用的一列 → 精确的数，与读不出的行：整数最多 12 位，小数最多 6 位。"""
    written = reading.read(seen)
    fits = written.str.contains(_EXPRESSION_NUMBER)
    numbers = written.zip_with(fits.fill_null(value=False), pl.Series([None], dtype=pl.String)).cast(
        EXPRESSION_NUMBER, strict=False
    )
    problem = f"{reading.problem()} with at most 12 digits before and 6 after the point"
    return numbers.alias(name), _find_unreadable(cells, name, numbers, name, problem)


def convert_times(
    raw: pl.DataFrame, name: str, column: str, reading: TimeColumn, seen: SeenTimes, time_zone: str
) -> tuple[pl.Series, pl.DataFrame]:
    """一列时刻，写法由整列定 → UTC 时刻，与读不出的行；没有的日期、没有或有两次的钟点都是坏行。"""
    instants, local = reading.read(seen, time_zone)
    unreadable = _find_unreadable(
        raw, name, instants, column, f"is not a possible date and time {reading.expected()} in {time_zone}"
    )
    if unreadable.height:
        blank = raw.filter(reading.is_blank(seen).fill_null(value=False)).select(ROW_NUMBER)
        unreadable = unreadable.join(blank, on=ROW_NUMBER, how="anti", maintain_order="left")
    return instants, _explain_clock_changes(raw, unreadable, local, time_zone)


def convert_formatted_times(
    raw: pl.DataFrame, name: str, column: str, formats: Sequence[str], time_zone: str, *, also_iso: bool
) -> tuple[pl.Series, pl.DataFrame]:
    """按配置的写法（合得上的第一种）读的、或表达式算出来的时刻；also_iso：表格里真正的日期单元格总是读成 ISO。"""
    values = raw[name]
    if values.dtype.is_temporal() or not formats:
        readings = [values.cast(pl.Datetime("us", getattr(values.dtype, "time_zone", None)))]
    else:
        text = values.cast(pl.String).str.strip_chars()
        readings = [read_format(text, time_format) for time_format in formats]
        readings += [read_year_first(text)] if also_iso else []
    instants, local = (
        localize(readings[0], time_zone),
        pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, values.len()),
    )
    for reading in readings:
        instants = instants.zip_with(instants.is_not_null(), localize(reading, time_zone))
        if reading.dtype == local.dtype:
            local = local.zip_with(local.is_not_null(), reading)
    expected = (
        f"written as {' or '.join(formats)}, the format of {name} in the profile,"
        if formats
        else "such as 2024-01-31 08:05:00"
    )
    unreadable = _find_unreadable(
        raw, name, instants, column, f"is not a possible date and time {expected} in {time_zone}"
    )
    return instants, _explain_clock_changes(raw, unreadable, local, time_zone)


def finish_amount(orders: pl.DataFrame, target: AmountTarget, *, column: str) -> tuple[pl.Series, list[pl.DataFrame]]:
    """金额收尾成 numeric(14,2)：多于两位小数是坏行，除非配置要求进位。"""
    cents = pl.col("amount").round(2, mode="half_away_from_zero")
    too_large = cents.abs() >= AMOUNT_LIMIT
    problems = [_find_number(orders, "amount", too_large, column, "is too large for numeric(14,2)")]
    if not target.round:
        problems.append(_find_number(orders, "amount", cents != pl.col("amount"), column, "has more than 2 decimals"))
    return orders.select(pl.when(~too_large).then(cents).cast(pl.Decimal(14, 2))).to_series(), problems


def finish_quantity(orders: pl.DataFrame, *, column: str) -> tuple[pl.Series, list[pl.DataFrame]]:
    """数量收尾成 integer。"""
    quantity = pl.col("quantity")
    whole = quantity.round(0, mode="half_away_from_zero")
    fits = whole.is_between(-INTEGER_LIMIT, INTEGER_LIMIT - 1)
    problems = [
        _find_number(orders, "quantity", whole != quantity, column, "is not a whole number"),
        _find_number(orders, "quantity", ~fits, column, "is too large for integer"),
    ]
    return orders.select(pl.when(fits).then(whole).cast(pl.Int32)).to_series(), problems


def _explain_clock_changes(
    raw: pl.DataFrame, unreadable: pl.DataFrame, local: pl.Series, time_zone: str
) -> pl.DataFrame:
    """读不出的行里，日期钟点本身没有错、只是那里没有或有两次的：说出两种读法。"""
    if not unreadable.height or local.dtype != pl.Datetime("us"):
        return unreadable
    times = pl.DataFrame({ROW_NUMBER: raw[ROW_NUMBER], "local": local})
    found = unreadable.join(times, on=ROW_NUMBER, how="left", maintain_order="left")["local"]
    explained = [describe_clock_change(moment, time_zone) if moment is not None else None for moment in found]
    return unreadable.with_columns(pl.coalesce(pl.Series(explained, dtype=pl.String), "problem").alias("problem"))


def _find_unreadable(raw: pl.DataFrame, name: str, converted: pl.Series, column: str, problem: str) -> pl.DataFrame:
    text = pl.col(name).cast(pl.String)
    table = raw.select(ROW_NUMBER, name, converted.is_null().alias("unreadable")).filter("unreadable")
    return find_problems(table, text.str.strip_chars() != "", column=column, problem=problem, value=text)


def _find_number(orders: pl.DataFrame, name: str, condition: pl.Expr, column: str, problem: str) -> pl.DataFrame:
    shown = pl.col(name).cast(pl.String).str.strip_chars_end("0").str.strip_suffix(".")
    return find_problems(orders, condition, column=column, problem=problem, value=shown)
