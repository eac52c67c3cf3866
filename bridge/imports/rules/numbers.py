"""一列数的写法：小数点还是小数逗号，由整列的值定，不逐格猜。

只凭 85.500 看不出是八十五块五还是八万五千五；同一列里别的值（12.50、4.711,98）看得出。
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl

from bridge.imports.rules.currencies import CURRENCY, OneCurrency
from bridge.imports.rules.errors import ColumnReading, ImportFileError, SeenCell
from bridge.imports.rules.typography import to_ascii

DecimalMark = Literal["point", "comma"]

# 这样写的数在哪一种写法里都一样，或者只能是小数点；已经知道是哪一种以后，可以放宽
_PLAIN = {None: r"^-?[0-9]+(?:\.[0-9]{1,2})?$", "point": r"^-?[0-9]+(?:\.[0-9]{0,16})?$", "comma": r"^-?[0-9]+$"}


def _body(decimal: str, group: str) -> str:
    """不带正负号与货币的数。分组只在该在的地方，而且前面不是 0：0.125 只能是小数。不收科学记数法。"""
    grouped = "|".join(rf"(?:{separator}[0-9]{{3}})+" for separator in (group, "'", " "))
    whole = rf"(?:[0-9]+|[1-9][0-9]{{0,2}}(?:{grouped}))"
    return rf"(?:{whole}(?:{decimal}[0-9]{{0,16}})?|{decimal}[0-9]{{1,16}})(?: ?[万亿])?"


def _number(decimal: str, group: str) -> str:
    """整个单元格：正负号在前在后、或括号，货币在前在后。"""
    body, currency = _body(decimal, group), CURRENCY
    unsigned = rf"(?:{currency} ?)?{body}(?: ?{currency})?"
    return rf"^(?:[+-]? ?{unsigned}|{currency} ?[+-] ?{body}|{unsigned} ?-|\( ?{unsigned} ?\))$"


_NUMBER: dict[DecimalMark, str] = {"point": _number(r"\.", ","), "comma": _number(",", r"\.")}
_OTHER: dict[DecimalMark, DecimalMark] = {"point": "comma", "comma": "point"}


_NOWHERE = SeenCell(-1, "")


@dataclass(frozen=True)
class SeenNumbers:
    """一列在一块里的值；plain 是不必改写就能读的（空值是 NULL）。"""

    text: pl.Series
    plain: pl.Series

    @property
    def all_plain(self) -> bool:
        return bool(self.plain.all())


class NumberColumn:
    """一列数：逐块看过去，记下第一个只能是小数点的、第一个只能是小数逗号的与第一个两可的值。

    :param given: 人说了是哪一种；那就不找，别种写法的值是坏行。
    :param numeric_rows: 工作簿里这一列的数（不是文字）在哪些行：它们总是小数点，不说明旁边的文字怎样写。要看才找。
    """

    def __init__(
        self,
        path: Path,
        column: str,
        given: DecimalMark | None,
        numeric_rows: Callable[[], Collection[int]] = lambda: (),
    ) -> None:
        self.column = column
        self._path = path
        self._given = given
        self._find_numeric = numeric_rows
        self._seen: dict[DecimalMark, SeenCell] = {}
        self._open: SeenCell | None = None
        self._currency = OneCurrency(path, column)

    @property
    def is_open(self) -> bool:
        """有两可的值，而看过的值里没有一个能定。"""
        return self._open is not None and self._given is None and not self._seen

    @property
    def mark(self) -> DecimalMark:
        if self._given is not None:
            return self._given
        return next(iter(self._seen), "point")

    def observe(self, rows: pl.Series, text: pl.Series) -> SeenNumbers:
        """看一块。

        :raises ImportFileError: 一列里两种写法都有。
        """
        known = self._given or next(iter(self._seen), None)
        seen = SeenNumbers(text, text.str.contains(_PLAIN[known]))
        if not seen.all_plain and self._numeric_rows:
            numeric = rows.is_in(list(self._numeric_rows))
            seen = SeenNumbers(text, seen.plain | (numeric & text.str.contains(_PLAIN["point"])))
            rows, text = rows.filter(~numeric), text.filter(~numeric)
            if self._seen.get("point", _NOWHERE).row in self._numeric_rows:
                del self._seen["point"]
            self._consider(rows, text, text.str.contains(_PLAIN[None]))
        else:
            self._consider(rows, text, seen.plain)
        return seen

    def _consider(self, rows: pl.Series, text: pl.Series, plain: pl.Series) -> None:
        if not plain.all():
            self._currency.observe(rows.filter(~plain), _tidy(text.filter(~plain)))
        if self._given is None:
            if "point" not in self._seen:
                self._note(
                    "point",
                    pl.DataFrame({"row": rows, "value": text}).filter(plain & text.str.contains(".", literal=True)),
                )
            if not plain.all():
                self._weigh(pl.DataFrame({"row": rows, "value": text}).filter(~plain))
            self._check()

    @cached_property
    def _numeric_rows(self) -> Collection[int]:
        return self._find_numeric()

    def read(self, seen: SeenNumbers) -> pl.Series:
        """-1234.50 那样的文字；不是数的是 NULL。"""
        if seen.all_plain:
            return seen.text
        others = (~seen.plain).fill_null(value=False).arg_true()
        written = _rewrite(_tidy(seen.text.gather(others)), self.mark)
        return seen.text.clone().scatter(others, written)

    def ask(self) -> ImportFileError:
        """值里看不出来，要人说。"""
        cell = self._open or SeenCell(0, "")
        readings = {mark: _rewrite(_tidy(pl.Series([cell.value])), mark)[0] for mark in _NUMBER}
        return ImportFileError(
            self._path,
            f"is {readings['point']} with a decimal point and {readings['comma']} with a decimal comma,"
            " and no value of the column tells which it has",
            row=cell.row,
            column=self.column,
            value=cell.value,
            advice="say --decimal-point or --decimal-comma (in a profile: decimal under [file])",
        )

    def describe(self) -> list[ColumnReading]:
        """选了什么，为什么；平常的小数点不必说。"""
        if self._given is None and self.mark == "point" and self._open is None:
            return []
        return [ColumnReading(self.column, f"numbers with a decimal {self.mark}", self._seen.get(self.mark))]

    def problem(self) -> str:
        return "is not a number with a decimal comma" if self.mark == "comma" else "is not a number"

    def _weigh(self, cells: pl.DataFrame) -> None:
        tidy = _tidy(cells["value"])
        fits = {mark: tidy.str.contains(pattern) for mark, pattern in _NUMBER.items()}
        for mark, other in _OTHER.items():
            if mark not in self._seen:
                self._note(mark, cells.filter(fits[mark] & ~fits[other]))
        if self._open is None:
            both = cells.filter(fits["point"] & fits["comma"] & tidy.str.contains("[.,]"))
            self._open = SeenCell(*both.row(0)) if both.height else None

    def _note(self, mark: DecimalMark, cells: pl.DataFrame) -> None:
        if cells.height:
            self._seen[mark] = SeenCell(*cells.row(0))

    def _check(self) -> None:
        if len(self._seen) < len(_NUMBER):
            return
        (_, first), (mark, second) = sorted(self._seen.items(), key=lambda item: item[1].row)
        raise ImportFileError(
            self._path,
            f"has a decimal {mark}, {first.value!r} in row {first.row} a decimal {_OTHER[mark]}",
            row=second.row,
            column=self.column,
            value=second.value,
            advice="write the column in one way, or say --decimal-point or --decimal-comma (in a profile: decimal under [file])"
            " to have the others treated as bad rows",
        )


def read_exact(text: pl.Series) -> pl.Series:
    """程序自己写出来的数（表达式算出的浮点数）：总是小数点。"""
    return pl.select(pl.when(text.str.contains(_PLAIN["point"])).then(text)).to_series()


def _tidy(text: pl.Series) -> pl.Series:
    return to_ascii(text).str.strip_chars().str.replace_all(r"\s+", " ")


def _rewrite(tidy: pl.Series, mark: DecimalMark) -> pl.Series:
    """整理过的文字 → -1234.50；万、亿就把小数点右移四位、八位，所以一分不差。"""
    text = pl.col("text")
    digits = text.str.extract(r"([0-9.,][0-9.,' ]*)")
    digits = digits.str.replace_all("[,' ]" if mark == "point" else "[.' ]", "").str.replace(",", ".", literal=True)
    sign = pl.when(text.str.contains(r"[-(]")).then(pl.lit("-")).otherwise(pl.lit(""))
    places = (
        pl.when(text.str.contains("万", literal=True))
        .then(4)
        .when(text.str.contains("亿", literal=True))
        .then(8)
        .otherwise(0)
    )
    parts = digits.str.splitn(".", 2)
    whole, fraction = parts.struct.field("field_0"), parts.struct.field("field_1").fill_null("")
    moved = (
        pl.when(places == 0)
        .then(digits)
        .otherwise(
            pl.concat_str(
                whole, fraction.str.slice(0, places).str.pad_end(places, "0"), pl.lit("."), fraction.str.slice(places)
            )
        )
    )
    frame = tidy.alias("text").to_frame()
    return frame.select(pl.when(text.str.contains(_NUMBER[mark])).then(pl.concat_str(sign, moved))).to_series()
