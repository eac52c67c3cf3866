"""表格软件弄丢了的单元格：舍入了的长号码、放不下的列、出错的公式。读得出却不对，所以一律是坏行。

为了不让表格软件这样做，平台把号码写成 ="0012"、前面加制表符或撇号：那些是号码本身。
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from bridge.imports.errors import ImportFileError
from bridge.imports.problems import ERROR_VALUE, EXPORT_AGAIN, ROUNDED, find_problems
from bridge.imports.profile import ROW_NUMBER
from bridge.imports.typography import full_width_to_ascii

# 表格软件只留 15 位有效数字，其余变成 0
_KEPT_DIGITS = 15
# 一个号码本来就以 n 个 0 结尾的机会是 10 的 -n 次方；合起来不到万分之一才说它是舍入的
_ENOUGH_ZEROS = 4

_ERROR = (
    r"^(?:#{3,}|#(?:N/A|REF!|NAME\?|NULL!|NUM!|VALUE!|DIV/0!|SPILL!|CALC!|FIELD!|GETTING_DATA|BLOCKED!|CONNECT!|UNKNOWN!)|Err:[0-9]{3})$"
)
_SCIENTIFIC = r"^\s*[+-]?[0-9](?:[.,][0-9]+)?[Ee]\+[0-9]{1,3}\s*$"
_LONG = r"^[0-9]{16,}$"


def find_error_values(frame: pl.DataFrame, name: str, column: str) -> pl.DataFrame:
    """#N/A、##### 之类；先用便宜的判断，多数文件里一个也没有。"""
    text = pl.col(name)
    suspects = frame.lazy().filter(text.str.starts_with("#") | text.str.starts_with("Err:")).select(ROW_NUMBER, name).collect()
    return find_problems(suspects, text.str.strip_chars().str.contains(_ERROR), column=column, problem=ERROR_VALUE, value=text)


def find_rounded(frame: pl.DataFrame, name: str, column: str) -> pl.DataFrame:
    """2.51236E+18 那样的号码。"""
    text = pl.col(name)
    suspects = frame.lazy().filter(text.str.contains("E+", literal=True) | text.str.contains("e+", literal=True))
    return find_problems(
        suspects.select(ROW_NUMBER, name).collect(), text.str.contains(_SCIENTIFIC), column=column, problem=ROUNDED, value=text
    )


def unprotect(ids: pl.Series) -> pl.Series:
    """="123"、制表符、撇号、全角数字：去掉保护，取号码本身。"""
    text = pl.col("id")
    wide = ids.str.len_bytes() > ids.str.len_chars()
    protected = ids.str.contains(r"^[\t'=]|\t$") | wide
    if not protected.any():
        return ids
    inner = full_width_to_ascii(text.str.strip_chars("\t")).str.replace(r'^="([^"]*)"$', "$1").str.replace(r"^'([^']+)$", "$1")
    return ids.alias("id").to_frame().select(pl.when(inner != "").then(inner).alias(ids.name)).to_series()


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
        if not (ids.str.len_bytes() > _KEPT_DIGITS).any():
            return
        table = pl.DataFrame({"row": rows, "id": ids}).filter(pl.col("id").str.contains(_LONG))
        rounded = table.filter(pl.col("id").str.slice(_KEPT_DIGITS).str.contains("^0+$"))
        self._long += table.height
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
                f"{ROUNDED}, as in {self._rounded} of the {self._long} long numbers of the column (rows {rows})",
                row=self._rows[0][0],
                column=self._column,
                value=self._rows[0][1],
                advice=EXPORT_AGAIN,
            )
