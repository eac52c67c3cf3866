"""把一个文件从头到尾读成一块块订单，一路记下合计与坏行。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import polars as pl

from bridge.imports.earlier_versions import TurnedBack
from bridge.imports.files.cells import CellBlock, Shape
from bridge.imports.known_files import KnownFile
from bridge.imports.orders.builder import OrderBuilder, trim
from bridge.imports.orders.items import MergedColumn
from bridge.imports.orders.lines import OrderNumbers
from bridge.imports.orders.statuses import CountsAs
from bridge.imports.preview import Preview
from bridge.imports.rejections import count_rejected
from bridge.imports.rules.errors import ColumnReading, ImportFileError
from bridge.imports.rules.problems import BadRows
from etl_assets.core.settings import EtlSettings

Progress = Callable[[int, int], None]
_TEXTS = ("order_id", "shop", "customer_name", "order_status")
# 状态列若其实是备注之类，种数没有尽头
_MOST_STATUSES = 1_000


@dataclass(frozen=True)
class StatusCount:
    """一种状态有几行、算作什么；没有状态的是 None。"""

    status: str | None
    rows: int
    counts_as: CountsAs


@dataclass(kw_only=True)
class ImportReport:
    """一次导入的结果，边读边记。

    :param file: 文件名。
    :param import_id: 试运行时是 None。
    :param rows: raw_orders 的行数。
    :param source_rows: 文件里的记录数，连坏行在内；一行一件商品时是商品行数。
    :param skipped_rows: 没有导入的记录数，原文在 rejected_file 里。
    :param read_as: 文件是怎样读的。
    :param profile: 配置的名字；profile_chosen：它是由表头认出来的。
    :param conventions: 数与时刻的写法与平常不同的列。
    :param orders: 不同的订单号（连同店）有几个。
    :param repeated_orders: 其中几个有不止一行，是一单的几个版本。
    :param amount: 各行金额的和，版本都在内；文件没有金额时是 None。
    :param statuses: 多的在前。
    :param merged: 一行一件商品时，看着值定的：各列怎样合成一单。
    :param imported_before: 同样的内容上一次的导入。
    :param turned_back: 它把更新的导出盖回去了。
    :param preview: 试运行才有。
    :param unknown_shops: 不在 shop_configs 里的店名与行数；ETL 会拒收这些行。
    :param rejected: 其余看一行就知道会被拒收的：规则与行数。
    """

    file: str
    read_as: Shape
    profile: str | None = None
    profile_chosen: bool = False
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
    orders: int = 0
    repeated_orders: int = 0
    amount: Decimal | None = None
    statuses: Sequence[StatusCount] = field(default_factory=list)
    merged: Sequence[MergedColumn] = field(default_factory=list)
    rejected: Mapping[str, int] = field(default_factory=dict)
    imported_before: KnownFile | None = None
    turned_back: TurnedBack | None = None
    preview: Preview | None = None
    seconds: float = 0.0


class Reading:
    """一次通读；orders() 走完之后，report 里的合计才是全的。

    :ivar columns: 每块里 raw_orders 的列。
    :ivar shops: 修剪过的店名与它的行数。
    """

    def __init__(
        self,
        builder: OrderBuilder,
        bad_rows: BadRows,
        *,
        skip_bad_rows: bool,
        on_orders: Callable[[pl.DataFrame], None] = lambda _: None,
        on_progress: Progress | None,
        settings: EtlSettings | None = None,
    ) -> None:
        """:param settings: 有哪些分区；None 就不说哪些行在它们之外。"""
        self._builder = builder
        self._settings = settings
        self.columns = builder.columns
        self._bad_rows = bad_rows
        self._skip_bad_rows = skip_bad_rows
        self._on_orders = on_orders
        self._on_progress = on_progress
        self.report = ImportReport(file=builder.source.path.name, read_as=builder.source.shape)
        self.shops: Counter[str] = Counter()
        self._statuses: Counter[str | None] = Counter()
        self._rejected: Counter[str] = Counter()
        self._numbers = OrderNumbers(builder)

    def orders(self) -> Iterator[pl.DataFrame]:
        """逐块给出订单。遇到坏行又不许跳过、或一单有几行而没有说那是什么时不再给出，但读到底，好说出还有多少。

        :raises ImportFileError: 有坏行而不许跳过，一单有几行而没有说那是什么，或一行也没有。
        """
        for block in self._blocks():
            orders = self._read(block)
            # 读下一块时，这一块不必还占着内存
            del block
            if orders is not None:
                yield orders
                del orders
        self._builder.finish()
        self._numbers.finish()
        self.report.orders, self.report.repeated_orders = self._numbers.distinct, self._numbers.repeated
        self.report.statuses = self._describe_statuses()
        self.report.rejected = dict(self._rejected)
        self.report.conventions = self._builder.conventions.describe()
        if self._bad_rows.count and not (self._skip_bad_rows and self.report.rows):
            raise self._bad_rows.error()
        if not self.report.rows:
            raise ImportFileError(self._builder.source.path, "the file has a header but no rows")

    def _read(self, block: CellBlock) -> pl.DataFrame | None:
        """一块里要导入的订单；没有、或已经知道要拒绝时是 None。"""
        if self._numbers.conflict:
            self._numbers.count(block)
            return None
        built = self._builder.build(block)
        self.report.source_rows += block.cells.height
        self.report.merged = built.merged
        self._bad_rows.add(built.problems, block.cells)
        texts = trim(built.orders, _TEXTS)
        self._numbers.observe(built, block, texts)
        if not built.orders.height or self._numbers.conflict or (self._bad_rows.count and not self._skip_bad_rows):
            return None
        self._count(built.orders, texts)
        self._on_orders(built.orders)
        return built.orders

    def _blocks(self) -> Iterator[CellBlock]:
        """要合并商品行时，整个文件是一块：一个订单的各行可以相隔很远。用不到的列这时不必都留着，除非要写到旁边的文件里。"""
        blocks = self._report(self._builder.source.blocks)
        if not self._builder.merges:
            yield from blocks
            return
        whole = [block if self._skip_bad_rows else self._builder.without_unused(block) for block in blocks]
        problems = [problem for block in whole for problem in block.problems]
        cells, short_rows, unread = (
            pl.concat([getattr(block, part) for block in whole]) for part in ("cells", "short_rows", "unread")
        )
        yield CellBlock(cells, problems, whole[-1].end_byte, short_rows, unread)

    def _report(self, blocks: Iterable[CellBlock]) -> Iterator[CellBlock]:
        for block in blocks:
            end_byte = block.end_byte
            yield block
            del block
            if self._on_progress:
                self._on_progress(end_byte, self._builder.source.size)

    def _count(self, orders: pl.DataFrame, texts: pl.DataFrame) -> None:
        report = self.report
        report.rows += orders.height
        self._rejected.update(count_rejected(orders, texts, self._settings))
        if "shop" in texts.columns:
            shops = texts["shop"].drop_nulls().value_counts()
            self.shops.update({name: rows for name, rows in shops.iter_rows() if name})
        if "amount" in orders.columns:
            report.amount = (report.amount or Decimal()) + Decimal(orders["amount"].sum() or 0)
        if "order_status" in texts.columns:
            self._statuses.update(dict(texts["order_status"].value_counts().iter_rows()))
            if len(self._statuses) > 2 * _MOST_STATUSES:
                self._statuses = Counter(dict(self._statuses.most_common(_MOST_STATUSES)))
        if "ordered_at" in orders.columns:
            found = (
                orders["ordered_at"].min(),
                orders["ordered_at"].max(),
                report.first_ordered_at,
                report.last_ordered_at,
            )
            moments = [moment for moment in found if isinstance(moment, datetime)]
            report.first_ordered_at, report.last_ordered_at = min(moments, default=None), max(moments, default=None)

    def _describe_statuses(self) -> list[StatusCount]:
        named = {status: rows for status, rows in self._statuses.items() if status}
        counts_as = self._builder.statuses.count_as(named)
        most_first = sorted(named.items(), key=lambda item: (-item[1], item[0]))
        found = [StatusCount(status, rows, counts_as[status]) for status, rows in most_first]
        missing = self._statuses.total() - sum(named.values())
        return found + ([StatusCount(None, missing, "order")] if missing else [])
