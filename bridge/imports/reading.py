"""把一个文件从头到尾读成一块块订单，一路记下合计与坏行。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

import polars as pl

from bridge.imports.cells import CellBlock
from bridge.imports.errors import ImportFileError
from bridge.imports.orders import OrderBuilder
from bridge.imports.problems import BadRows

Progress = Callable[[int, int], None]


class Reading:
    """一次通读；orders() 走完之后，合计才是全的。

    :ivar columns: 每块里 raw_orders 的列。
    :ivar source_rows: 文件里的记录数，连坏行在内；一行一件商品时是商品行数。
    :ivar shops: 修剪过的店名与它的行数。
    """

    def __init__(self, builder: OrderBuilder, bad_rows: BadRows, *, skip_bad_rows: bool, on_progress: Progress | None) -> None:
        self._builder = builder
        self.columns = builder.columns
        self._bad_rows = bad_rows
        self._skip_bad_rows = skip_bad_rows
        self._on_progress = on_progress
        self.rows = 0
        self.source_rows = 0
        self.shops: Counter[str] = Counter()
        self.first_ordered_at: datetime | None = None
        self.last_ordered_at: datetime | None = None

    def orders(self) -> Iterator[pl.DataFrame]:
        """逐块给出订单。遇到坏行又不许跳过时不再给出，但读到底，好说出还有多少。

        :raises ImportFileError: 有坏行而不许跳过，或一行也没有。
        """
        for block in self._blocks():
            built = self._builder.build(block)
            self.source_rows += block.cells.height
            self._bad_rows.add(built.problems, block.cells)
            if built.orders.height and (self._skip_bad_rows or not self._bad_rows.count):
                self._count(built.orders)
                yield built.orders
        self._builder.finish()
        if self._bad_rows.count and not (self._skip_bad_rows and self.rows):
            raise self._bad_rows.error()
        if not self.rows:
            raise ImportFileError(self._builder.source.path, "the file has a header but no rows")

    def _blocks(self) -> Iterator[CellBlock]:
        """要合并商品行时，整个文件是一块：一个订单的各行可以相隔很远。"""
        blocks = self._report(self._builder.source.blocks)
        if self._builder.mapping.group is None:
            yield from blocks
            return
        whole = list(blocks)
        problems = [problem for block in whole for problem in block.problems]
        yield CellBlock(pl.concat([block.cells for block in whole]), problems, whole[-1].end_byte)

    def _report(self, blocks: Iterable[CellBlock]) -> Iterator[CellBlock]:
        total_bytes = self._builder.source.path.stat().st_size
        for block in blocks:
            yield block
            if self._on_progress:
                self._on_progress(block.end_byte, total_bytes)

    def _count(self, orders: pl.DataFrame) -> None:
        self.rows += orders.height
        if "shop" in orders.columns:
            shops = orders["shop"].str.strip_chars().drop_nulls().value_counts()
            self.shops.update({name: rows for name, rows in shops.iter_rows() if name})
        if "ordered_at" in orders.columns:
            moments = [moment for moment in (orders["ordered_at"].min(), orders["ordered_at"].max()) if isinstance(moment, datetime)]
            self.first_ordered_at = min([*moments, *([self.first_ordered_at] if self.first_ordered_at else [])], default=None)
            self.last_ordered_at = max([*moments, *([self.last_ordered_at] if self.last_ordered_at else [])], default=None)
