"""把一个文件从头到尾读成一块块订单，一路记下合计与坏行。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import UUID

import polars as pl

from bridge.imports.cells import CellBlock, Shape
from bridge.imports.errors import ImportFileError
from bridge.imports.orders import OrderBuilder
from bridge.imports.problems import BadRows

Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class ImportReport:
    """一次导入的结果，边读边记。

    :param import_id: 试运行时是 None。
    :param rows: raw_orders 的行数。
    :param source_rows: 文件里的记录数，连坏行在内；一行一件商品时是商品行数。
    :param skipped_rows: 没有导入的记录数，原文在 rejected_file 里。
    :param read_as: 文件是怎样读的。
    :param unknown_shops: 不在 shop_configs 里的店名与行数；ETL 会拒收这些行。
    """

    read_as: Shape
    import_id: UUID | None = None
    rows: int = 0
    source_rows: int = 0
    skipped_rows: int = 0
    rejected_file: Path | None = None
    unknown_shops: Mapping[str, int] = field(default_factory=dict)
    created_shops: Sequence[str] = field(default_factory=list)
    first_ordered_at: datetime | None = None
    last_ordered_at: datetime | None = None
    seconds: float = 0.0


class Reading:
    """一次通读；orders() 走完之后，report 里的合计才是全的。

    :ivar columns: 每块里 raw_orders 的列。
    :ivar shops: 修剪过的店名与它的行数。
    """

    def __init__(self, builder: OrderBuilder, bad_rows: BadRows, *, skip_bad_rows: bool, on_progress: Progress | None) -> None:
        self._builder = builder
        self.columns = builder.columns
        self._bad_rows = bad_rows
        self._skip_bad_rows = skip_bad_rows
        self._on_progress = on_progress
        self.report = ImportReport(read_as=builder.source.shape)
        self.shops: Counter[str] = Counter()

    def orders(self) -> Iterator[pl.DataFrame]:
        """逐块给出订单。遇到坏行又不许跳过时不再给出，但读到底，好说出还有多少。

        :raises ImportFileError: 有坏行而不许跳过，或一行也没有。
        """
        for block in self._blocks():
            built = self._builder.build(block)
            self.report.source_rows += block.cells.height
            self._bad_rows.add(built.problems, block.cells)
            if built.orders.height and (self._skip_bad_rows or not self._bad_rows.count):
                self._count(built.orders)
                yield built.orders
        if self._bad_rows.count and not (self._skip_bad_rows and self.report.rows):
            raise self._bad_rows.error()
        if not self.report.rows:
            raise ImportFileError(self._builder.source.path, "the file has a header but no rows")

    def _blocks(self) -> Iterator[CellBlock]:
        """要合并商品行时，整个文件是一块：一个订单的各行可以相隔很远。"""
        blocks = self._report(self._builder.source.blocks)
        if self._builder.mapping.profile.group is None:
            yield from blocks
            return
        whole = list(blocks)
        problems = [problem for block in whole for problem in block.problems]
        cells, short_rows, unread = (pl.concat([getattr(block, part) for block in whole]) for part in ("cells", "short_rows", "unread"))
        yield CellBlock(cells, problems, whole[-1].end_byte, short_rows, unread)

    def _report(self, blocks: Iterable[CellBlock]) -> Iterator[CellBlock]:
        for block in blocks:
            yield block
            if self._on_progress:
                self._on_progress(block.end_byte, self._builder.source.size)

    def _count(self, orders: pl.DataFrame) -> None:
        report = self.report
        report.rows += orders.height
        if "shop" in orders.columns:
            shops = orders["shop"].str.strip_chars().drop_nulls().value_counts()
            self.shops.update({name: rows for name, rows in shops.iter_rows() if name})
        if "ordered_at" in orders.columns:
            found = (orders["ordered_at"].min(), orders["ordered_at"].max(), report.first_ordered_at, report.last_ordered_at)
            moments = [moment for moment in found if isinstance(moment, datetime)]
            report.first_ordered_at, report.last_ordered_at = min(moments, default=None), max(moments, default=None)
