"""存下的行各是文件的第几行：略去的、坏的、跨行的、合并的之外都一行接一行，所以只记不接着的地方。"""

from __future__ import annotations

import polars as pl

from bridge.imports.rules.profile import ROW_NUMBER
from etl_assets.reports.why.orders import MOST_PLACES


class FileRows:
    """一次导入的，边读边记；行太多、没有人会去数的，什么也不留。

    :ivar first_places: 接着的一段从存下的第几行开始，从 1 数起，升序。
    :ivar first_rows: 那一行是文件的第几行；合并的是第一行。
    """

    def __init__(self) -> None:
        self.first_places: list[int] = []
        self.first_rows: list[int] = []
        self._stored = 0
        self._last_row = -1

    def add(self, orders: pl.DataFrame) -> None:
        """:param orders: 照存下的先后，有 ROW_NUMBER。"""
        if self._stored + orders.height > MOST_PLACES:
            self.first_places, self.first_rows = [], []
            self._stored = MOST_PLACES
            return
        rows = orders[ROW_NUMBER]
        begins = (rows != rows.shift(1, fill_value=self._last_row) + 1).arg_true()
        self.first_places += (begins.cast(pl.Int64) + self._stored + 1).to_list()
        self.first_rows += rows.gather(begins).to_list()
        self._stored += orders.height
        self._last_row = rows[-1]
