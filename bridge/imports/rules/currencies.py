"""一列金额是一种货币的：两种货币的数加在一起，谁也看不出错。"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from bridge.imports.rules.errors import ImportFileError, SeenCell

_CODES = (
    "CNY|RMB|USD|EUR|GBP|JPY|HKD|TWD|BRL|SGD|MYR|IDR|THB|VND|PHP|KRW|INR|AUD|CAD|CHF|PLN|CZK|SEK|NOK|DKK|MXN|RUB|TRY"
)
CURRENCY = rf"(?:[A-Z]{{0,3}}\p{{Sc}}|{_CODES}|元|円|人民币|RM|Rp|zł|Kč|kr)"
"""一个数前后的货币。"""

_DOLLARS = frozenset({"USD", "HKD", "TWD", "SGD", "AUD", "CAD", "MXN"})
# 一个记号可以是哪几种货币；不在这里的，只是它自己
_POSSIBLE = {
    "¥": frozenset({"CNY", "JPY"}),
    "$": _DOLLARS,
    **dict.fromkeys(("RMB", "CN¥", "人民币"), frozenset({"CNY"})),
    "元": frozenset({"CNY", "HKD", "TWD"}),
    **dict.fromkeys(("円", "JP¥"), frozenset({"JPY"})),
    "US$": frozenset({"USD"}),
    "HK$": frozenset({"HKD"}),
    "NT$": frozenset({"TWD"}),
    "S$": frozenset({"SGD"}),
    "A$": frozenset({"AUD"}),
    "C$": frozenset({"CAD"}),
    "R$": frozenset({"BRL"}),
    "€": frozenset({"EUR"}),
    "£": frozenset({"GBP"}),
    "₩": frozenset({"KRW"}),
    "RM": frozenset({"MYR"}),
    "Rp": frozenset({"IDR"}),
    "zł": frozenset({"PLN"}),
    "Kč": frozenset({"CZK"}),
    "kr": frozenset({"SEK", "NOK", "DKK"}),
}
_ADVICE = "import each currency from a file of its own, or compute the amount from it in a profile"
_NAME = r"^(?:[A-Z]{3}|\p{Han}*(?:元|币|镑|円))$"
# 没有配置说它是货币的列，凭名字认
COLUMNS = frozenset({"currency", "currency code", "currency_code", "currency-code", "货币", "币种", "货币类型", "通貨"})


class OneCurrency:
    """一列里的货币记号，逐块看过去；没有记号的值与哪一种都合得来。"""

    def __init__(self, path: Path, column: str) -> None:
        self._path = path
        self._column = column
        self._first: tuple[frozenset[str], SeenCell] | None = None

    def observe(self, rows: pl.Series, tidy: pl.Series) -> None:
        """
        :raises ImportFileError: 两个值不会是同一种货币。
        """
        cells = pl.DataFrame({"row": rows, "value": tidy, "mark": tidy.str.extract(f"({CURRENCY})")})
        for row, value, mark in cells.drop_nulls("mark").unique("mark", keep="first", maintain_order=True).rows():
            possible = _POSSIBLE.get(mark, frozenset({mark}))
            if self._first is None:
                self._first = (possible, SeenCell(row, value))
                continue
            known, first = self._first
            if not known & possible:
                raise ImportFileError(
                    self._path,
                    f"is another currency than {first.value!r} in row {first.row}",
                    row=row,
                    column=self._column,
                    value=value,
                    advice=_ADVICE,
                )
            self._first = (known & possible, first)


class CurrencyColumn:
    """另有一列写着货币、而金额不由它算出时，这一列只许有一个值；不像货币的值不看。"""

    def __init__(self, path: Path, column: str) -> None:
        self.name = column
        self._path = path
        self._first: SeenCell | None = None

    def observe(self, rows: pl.Series, cells: pl.Series) -> None:
        """
        :raises ImportFileError: 有两个值。
        """
        values = pl.DataFrame({"row": rows, "value": cells.cast(pl.String).str.strip_chars().str.to_uppercase()})
        found = values.filter(pl.col("value").str.contains(_NAME)).unique("value", keep="first", maintain_order=True)
        for row, value in found.rows():
            if self._first is None:
                self._first = SeenCell(row, value)
            elif value != self._first.value:
                raise ImportFileError(
                    self._path,
                    f"is another currency than {self._first.value!r} in row {self._first.row}",
                    row=row,
                    column=self.name,
                    value=value,
                    advice=_ADVICE,
                )
