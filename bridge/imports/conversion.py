"""文字变成金额、数量与时刻；读不出的是坏行，不猜也不当作空。"""

from __future__ import annotations

import re

import polars as pl

from bridge.imports.problems import PROBLEMS, find_problems
from bridge.imports.profile import ROW_NUMBER, AmountTarget, TextTarget, TimeTarget

# 小数最多 16 位、整数最多 22 位；表格软件里的数最多 15 位有效数字
NUMBER = pl.Decimal(38, 16)
# 表达式里的数：两个数相乘时小数位相加，总共 38 位要够用
EXPRESSION_NUMBER = pl.Decimal(38, 6)
AMOUNT_LIMIT = 10**12  # numeric(14,2)
INTEGER_LIMIT = 2**31
# chrono 也接受 "24/1/5" 那样的年份；公元 1000 年以前的一定是读错了
_FIRST_YEAR = 1000

# 正负号，可有一个货币符号；千分位逗号只在该在的地方；不收科学记数法
_DIGITS = r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)"
_PLAIN_NUMBER = rf"^\s*(?:[+-]?[¥￥$]?|[¥￥$][+-])\s*(?:{_DIGITS}(?:\.[0-9]{{0,16}})?|\.[0-9]{{1,16}})\s*$"
_EXPRESSION_NUMBER = r"^\s*[+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})(?:\.[0-9]{0,6})?\s*$"

_NAIVE_FORMATS = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f")
_ZONED_FORMATS = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z")
_INSTANT = pl.Datetime("us", "UTC")


def to_number(text: pl.Expr) -> pl.Expr:
    """¥1,234.50 那样的文字 → 精确的数；不是数、或大到装不下的是 NULL。"""
    digits = text.str.replace_all(r"[¥￥$,\s]", "")
    return pl.when(text.str.contains(_PLAIN_NUMBER)).then(digits).cast(NUMBER, strict=False)


def to_expression_number(text: pl.Expr) -> pl.Expr:
    """表达式要用的数：整数最多 12 位，小数最多 6 位。"""
    digits = text.str.replace_all(r"[,\s]", "")
    return pl.when(text.str.contains(_EXPRESSION_NUMBER)).then(digits).cast(EXPRESSION_NUMBER, strict=False)


def to_instant(values: pl.Series, *, time_format: str | None, time_zone: str, also_iso: bool) -> pl.Series:
    """文字或日期 → UTC 时刻；不存在的日期、夏令时跳过的时刻是 NULL，重复的时刻取早的。

    没给 format 时收 ISO 8601 与斜线写法（2024-01-05 8:05、2024/1/5、带时区的也行）；
    also_iso：给了 format 也收 ISO，因为表格里真正的日期单元格总是读成 ISO。
    """
    if values.dtype.is_temporal():
        return _localize(values.cast(pl.Datetime("us", getattr(values.dtype, "time_zone", None))), time_zone)
    text = values.cast(pl.String).str.strip_chars()
    if time_format is None:
        return _parse_iso(text, time_zone)
    parsed = _localize(_parse(text, time_format), time_zone)
    return parsed.zip_with(parsed.is_not_null(), _parse_iso(text, time_zone)) if also_iso else parsed


def _parse_iso(text: pl.Series, time_zone: str) -> pl.Series:
    found = _localize(_parse(text, _NAIVE_FORMATS[0]), time_zone)
    if not (found.is_null() & text.is_not_null()).any():
        return found
    plain = text.str.replace_all("/", "-", literal=True).str.replace(r"^([0-9-]+)T", "$1 ")
    for time_format in (*_NAIVE_FORMATS, *_ZONED_FORMATS):
        if not (found.is_null() & plain.is_not_null()).any():
            break
        missing = plain.zip_with(found.is_null(), pl.Series([None], dtype=pl.String))
        found = found.zip_with(found.is_not_null(), _localize(_parse(missing, time_format), time_zone))
    return found


def _parse(text: pl.Series, time_format: str) -> pl.Series:
    parsed = text.str.to_datetime(time_format, strict=False, time_unit="us")
    usable = (parsed.dt.year() >= _FIRST_YEAR) & ~text.str.contains(":60", literal=True)
    if re.search(r"%[A-Za-z]%[A-Za-z]", time_format):
        # 20240105 那样连写的，少一位也会被读成别的日子：写回去要一样
        usable &= parsed.dt.strftime(time_format) == text
    return parsed.zip_with(usable.fill_null(False), pl.Series([None], dtype=parsed.dtype))


def _localize(times: pl.Series, time_zone: str) -> pl.Series:
    if isinstance(times.dtype, pl.Datetime) and times.dtype.time_zone is not None:
        return times.dt.convert_time_zone("UTC").cast(_INSTANT)
    local = times.dt.replace_time_zone(time_zone, ambiguous="earliest", non_existent="null")
    return local.dt.convert_time_zone("UTC")


def convert(
    raw: pl.DataFrame, name: str, target: TextTarget, *, column: str, time_zone: str, also_iso: bool
) -> tuple[pl.Series, pl.DataFrame]:
    """一列原值 → 该有的类型，与读不出的行；全是空白的金额、数量、时刻是 NULL。

    金额与数量此时还是 NUMBER：先汇总，再由 finish_amount、finish_quantity 收尾。
    """
    if isinstance(target, TimeTarget):
        zone = target.time_zone or time_zone
        instants = to_instant(raw[name], time_format=target.format, time_zone=zone, also_iso=also_iso)
        expected = f"written as {target.format}" if target.format else "such as 2024-01-31 08:05:00"
        return instants, _find_unreadable(raw, name, instants, column, pl.lit(f"is not a possible date and time {expected} in {zone}"))
    text = pl.col(name).cast(pl.String)
    if isinstance(target, AmountTarget) or name == "quantity":
        exact = raw[name].dtype.is_integer() or raw[name].dtype.is_decimal()
        numbers = raw.select(pl.col(name).cast(NUMBER, strict=False) if exact else to_number(text)).to_series()
        too_large = text.str.contains(_PLAIN_NUMBER)
        problem = pl.when(too_large).then(pl.lit("is too large")).otherwise(pl.lit("is not a number"))
        return numbers, _find_unreadable(raw, name, numbers, column, problem)
    return raw.select(pl.when(text != "").then(text)).to_series(), pl.DataFrame(schema=PROBLEMS)


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


def find_unreadable_numbers(cells: pl.DataFrame, column: str) -> pl.DataFrame:
    """表达式要用、却不是数的单元格。"""
    text = pl.col(column)
    unreadable = (text.str.strip_chars() != "") & to_expression_number(text).is_null()
    problem = "is not a number with at most 12 digits before and 6 after the point"
    return find_problems(cells, unreadable, column=column, problem=problem, value=text)


def _find_unreadable(raw: pl.DataFrame, name: str, converted: pl.Series, column: str, problem: pl.Expr) -> pl.DataFrame:
    text = pl.col(name).cast(pl.String)
    table = raw.select(ROW_NUMBER, name, converted.is_null().alias("unreadable")).filter("unreadable")
    return find_problems(table, text.str.strip_chars() != "", column=column, problem=problem, value=text)


def _find_number(orders: pl.DataFrame, name: str, condition: pl.Expr, column: str, problem: str) -> pl.DataFrame:
    shown = pl.col(name).cast(pl.String).str.strip_chars_end("0").str.strip_suffix(".")
    return find_problems(orders, condition, column=column, problem=problem, value=shown)
