"""表格软件弄丢了的单元格：舍入了的长号码、放不下的列、出错的公式。读得出却不对，所以一律是坏行。

为了不让表格软件这样做，平台把号码写成 ="0012"、前面加制表符或撇号：那些是号码本身。
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import polars as pl

from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import (
    ERROR_VALUE,
    EXPORT_AGAIN,
    MADE_DATE,
    MADE_DECIMAL,
    PROBLEMS,
    ROUNDED,
    find_problems,
)
from bridge.imports.rules.profile import ROW_NUMBER
from bridge.imports.rules.typography import full_width_to_ascii

# 表格软件只留 15 位有效数字，其余变成 0
_KEPT_DIGITS = 15
# 一个号码本来就以 n 个 0 结尾的机会是 10 的 -n 次方；合起来不到万分之一才说它是舍入的
_ENOUGH_ZEROS = 4

_ERROR = (
    r"^#(?:##+|N/A|REF!|NAME\?|NULL!|NUM!|VALUE!|DIV/0!|SPILL!|CALC!|FIELD!|GETTING_DATA|BLOCKED!|CONNECT!|UNKNOWN!)$"
)
# 有小数点的，不写加号也是（2.51236E18）；12E10 是号码
_SCIENTIFIC = r"^[+-]?[0-9](?:(?:[.,][0-9]+)?[Ee]\+|[.,][0-9]+[Ee])[0-9]{1,3}$"
_DECIMAL = r"^[0-9]{3,}\.0$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(?: [0-9:.]+)?$"
_ROUNDED_ID = r"^[0-9]{15}0+$"


def find_error_values(frame: pl.DataFrame, name: str, column: str) -> pl.DataFrame:
    """#N/A、##### 之类。"""
    return _find(frame, name, column, frame[name].str.starts_with("#"), _ERROR, ERROR_VALUE)


def find_rounded(frame: pl.DataFrame, name: str, column: str) -> pl.DataFrame:
    """2.51236E+18、1001.0 那样的号码。"""
    text = frame[name]
    return pl.concat(
        [
            _find(frame, name, column, text.str.contains("[Ee]\\+?[0-9]"), _SCIENTIFIC, ROUNDED),
            _find(frame, name, column, text.str.strip_chars_end().str.ends_with(".0"), _DECIMAL, MADE_DECIMAL),
        ]
    )


def find_dates(
    frame: pl.DataFrame, name: str, column: str, numeric_rows: Callable[[], Collection[int]]
) -> pl.DataFrame:
    """表格软件把 3-12 那样的号码变成了日期的单元格；写成文字的日期不是。"""
    dates = frame.filter(pl.col(name).str.contains(_DATE))
    if not dates.height:
        return pl.DataFrame(schema=PROBLEMS)
    is_number = pl.col(ROW_NUMBER).is_in(list(numeric_rows()))
    return find_problems(dates, is_number, column=column, problem=MADE_DATE, value=pl.col(name))


def _find(frame: pl.DataFrame, name: str, column: str, suspects: pl.Series, pattern: str, problem: str) -> pl.DataFrame:
    """先用便宜的判断挑出 suspects，多数文件里一个也没有。"""
    if not suspects.any():
        return pl.DataFrame(schema=PROBLEMS)
    text = pl.col(name)
    found = frame.select(ROW_NUMBER, name).filter(suspects)
    return find_problems(
        found, text.str.strip_chars().str.contains(pattern), column=column, problem=problem, value=text
    )


def unprotect(ids: pl.Series) -> pl.Series:
    """="123"、制表符、撇号、全角数字：去掉保护，取号码本身。"""
    text = pl.col("id")
    wide = ids.str.len_bytes() > ids.str.len_chars()
    starts = [ids.str.starts_with(mark) for mark in ("\t", "'", "=")]
    if not any(protected.any() for protected in (*starts, ids.str.ends_with("\t"), wide)):
        return ids
    inner = (
        full_width_to_ascii(text.str.strip_chars("\t"))
        .str.replace(r'^="([^"]*)"$', "$1")
        .str.replace(r"^'([^']+)$", "$1")
    )
    return ids.alias("id").to_frame().select(pl.when(inner != "").then(inner).alias(ids.name)).to_series()


def without_apostrophe(text: pl.Expr) -> pl.Expr:
    """'交易关闭、'13800138000：表格软件里表示「这是文字」的撇号；'t Hart 那样的名字不是。"""
    return text.str.replace(r"^'([0-9\p{Han}][^']*)$", "$1")


class RoundedIds:
    """一列长号码：16 位以上的若多半在第 15 位之后全是 0，就是被表格软件舍入过的。要看完整个文件才知道。"""

    def __init__(self, path: Path, column: str) -> None:
        self._path = path
        self._column = column
        self._long = 0
        self._rounded = 0
        self._zeros = 0
        self._rows: list[tuple[int, str]] = []

    def observe(self, rows: pl.Series, ids: pl.Series) -> None:
        is_long = ids.str.len_bytes() > _KEPT_DIGITS
        self._long += int(is_long.sum() or 0)
        rounded = pl.DataFrame({"row": rows, "id": ids}).filter(is_long & ids.str.ends_with("0"))
        rounded = rounded.filter(pl.col("id").str.contains(_ROUNDED_ID))
        self._rounded += rounded.height
        self._zeros += int((rounded["id"].unique().str.len_bytes() - _KEPT_DIGITS).sum() or 0)
        self._rows += rounded.head(6 - len(self._rows)).rows()

    def check(self) -> None:
        """
        :raises ImportFileError: 这一列的号码被舍入过。
        """
        if self._rounded * 2 > self._long and self._zeros >= _ENOUGH_ZEROS:
            rows = ", ".join(str(row) for row, _ in self._rows[:5]) + (", …" if self._rounded > 5 else "")
            raise ImportFileError(
                self._path,
                f"{ROUNDED}, as in {self._rounded} of the {self._long} long ids of the column (rows {rows})",
                row=self._rows[0][0],
                column=self._column,
                value=self._rows[0][1],
                advice=EXPORT_AGAIN,
            )
