"""打开一个文件，不管它是文本还是表格，从头到尾读成一块块订单，一路记下合计与坏行。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from uuid import UUID

import polars as pl

from bridge.imports.cells import CellBlock, Source
from bridge.imports.errors import ColumnReading, ImportFileError
from bridge.imports.orders import OrderBuilder
from bridge.imports.problems import BadRows
from bridge.imports.profile import FileFormat
from bridge.imports.spreadsheet import is_spreadsheet, open_spreadsheet
from bridge.imports.text_table import open_text_table

Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class ImportReport:
    """一次导入的结果，边读边记。

    :param import_id: 试运行时是 None。
    :param rows: raw_orders 的行数。
    :param source_rows: 文件里的记录数，连坏行在内；一行一件商品时是商品行数。
    :param skipped_rows: 没有导入的记录数，原文在 rejected_file 里。
    :param conventions: 数与时刻的写法与平常不同的列。
    :param unknown_shops: 不在 shop_configs 里的店名与行数；ETL 会拒收这些行。
    """

    import_id: UUID | None = None
    rows: int = 0
    source_rows: int = 0
    skipped_rows: int = 0
    rejected_file: Path | None = None
    unknown_shops: Mapping[str, int] = field(default_factory=dict)
    created_shops: Sequence[str] = field(default_factory=list)
    first_ordered_at: datetime | None = None
    last_ordered_at: datetime | None = None
    conventions: Sequence[ColumnReading] = field(default_factory=list)
    seconds: float = 0.0


def open_source(path: Path, file: FileFormat) -> Source:
    """按 format 打开；没写就看内容。

    :raises ImportFileError: 没有这个文件、读不了、是空的，或表头不能用。
    """
    try:
        return replace(_open(path, file), reread=lambda: _open(path, file).blocks)
    except OSError as error:
        raise ImportFileError(path, f"the file cannot be read ({error.strerror})", advice=f"check the path {path}") from error


def _open(path: Path, file: FileFormat) -> Source:
    if file.format == "excel" or (file.format is None and is_spreadsheet(path)):
        return open_spreadsheet(path, file)
    return open_text_table(path, file)


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
        self.report = ImportReport()
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
        self._builder.finish()
        self.report.conventions = self._builder.conventions.describe()
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
        yield CellBlock(pl.concat([block.cells for block in whole]), problems, whole[-1].end_byte)

    def _report(self, blocks: Iterable[CellBlock]) -> Iterator[CellBlock]:
        total_bytes = self._builder.source.path.stat().st_size
        for block in blocks:
            yield block
            if self._on_progress:
                self._on_progress(block.end_byte, total_bytes)

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
