"""来源的行 → raw_orders 的行：取值、换类型、按订单合并商品行，坏行分出来。"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from bridge.imports.cells import CellBlock, Source
from bridge.imports.conversion import convert, find_unreadable_numbers, finish_amount, finish_quantity, to_expression_number
from bridge.imports.errors import ImportFileError
from bridge.imports.mapping import ColumnMapping
from bridge.imports.problems import find_problems, merge_problems
from bridge.imports.profile import ROW_NUMBER, AmountTarget, TextTarget

_KEY = "group key "


@dataclass(frozen=True)
class OrderBlock:
    """一块的结果。orders 每行一个订单：行号（合并的取第一行）与 raw_orders 的列；problems 每个坏行一条。"""

    orders: pl.DataFrame
    problems: pl.DataFrame


@dataclass(frozen=True)
class OrderBuilder:
    """一个文件的取值规则；time_zone 用于没有时区的时间。"""

    source: Source
    mapping: ColumnMapping
    time_zone: str

    @property
    def columns(self) -> tuple[str, ...]:
        """写进 raw_orders 的列。"""
        return (*self.mapping.targets, *(("extra",) if self._unused else ()))

    @property
    def _unused(self) -> list[str]:
        return [name for name in self.source.columns if name not in self.mapping.used] if self.mapping.profile.keep_extra else []

    def build(self, block: CellBlock) -> OrderBlock:
        """一块单元格变成订单；要合并时，整个文件必须是一块。"""
        profile = self.mapping.profile
        group, numbers = profile.group, profile.file.numbers
        missing = block.find_missing(self.source.columns, self.mapping.used)
        problems = [missing, *block.problems, *(find_unreadable_numbers(block.cells, name) for name in numbers)]
        table = block.cells.with_columns(to_expression_number(pl.col(name)) for name in numbers)
        by_line = {name: target for name, target in self.mapping.targets.items() if target.aggregate_expression is None}
        lines = self._convert(self._evaluate(table, by_line), by_line, problems)
        if group:
            keys = [pl.col(name).alias(f"{_KEY}{name}") for name in group.by]
            lines = lines.with_columns(table.select(*keys, _lone_row(group.by).alias(_KEY)))
        orders = self._finish(self._group(lines, table, problems) if group else lines, problems)
        bad = merge_problems(problems)
        if group and bad.height:
            bad = merge_problems([bad, _find_companions(lines, bad)])
        return OrderBlock(self._add_extra(orders.join(bad, on=ROW_NUMBER, how="anti", maintain_order="left"), block.cells), bad)

    def _evaluate(self, table: pl.DataFrame, targets: dict[str, TextTarget]) -> pl.DataFrame:
        columns = [self._compute(table.lazy().select(ROW_NUMBER, self.mapping.sources[name].alias(name)), name) for name in targets]
        return pl.DataFrame([table[ROW_NUMBER], *(column[name] for column, name in zip(columns, targets, strict=True))])

    def _convert(self, raw: pl.DataFrame, targets: dict[str, TextTarget], problems: list[pl.DataFrame]) -> pl.DataFrame:
        """逐列换类型；坏行记进 problems。"""
        converted: list[pl.Series] = []
        for name, target in targets.items():
            column = self._shown_column(name)
            values, unreadable = convert(raw, name, target, column=column, time_zone=self.time_zone, also_iso=self.source.is_spreadsheet)
            converted.append(values.alias(name))
            problems.append(unreadable)
        return raw.with_columns(converted)

    def _group(self, lines: pl.DataFrame, table: pl.DataFrame, problems: list[pl.DataFrame]) -> pl.DataFrame:
        """同一订单的商品行合成一行，按第一行的先后。"""
        keys = [name for name in lines.columns if name.startswith(_KEY)]
        by_order = {name: target for name, target in self.mapping.targets.items() if target.aggregate_expression is not None}
        merged = [_aggregate(name, target) for name, target in self.mapping.targets.items() if name not in by_order]
        orders = self._compute(lines.lazy().group_by(keys, maintain_order=True).agg(pl.col(ROW_NUMBER).first(), *merged), "[group]")
        if not by_order:
            return orders
        grouped = table.lazy().with_columns(lines.select(keys)).group_by(keys, maintain_order=True)
        for name in by_order:
            values = self._compute(grouped.agg(self.mapping.sources[name].alias(name)), name)
            if isinstance(values[name].dtype, pl.List):
                problem = f"the aggregate_expression of {name} gives several values per order"
                raise ImportFileError(self.source.path, problem, advice="use SUM, MAX, FIRST … in it")
            orders = orders.with_columns(values[name])
        return self._convert(orders, by_order, problems)

    def _finish(self, orders: pl.DataFrame, problems: list[pl.DataFrame]) -> pl.DataFrame:
        """金额与数量收尾成表里的类型。"""
        amount = self.mapping.targets.get("amount")
        if isinstance(amount, AmountTarget):
            values, bad = finish_amount(orders, amount, column=self._shown_column("amount"))
            problems += bad
            orders = orders.with_columns(values.alias("amount"))
        if "quantity" in self.mapping.targets:
            values, bad = finish_quantity(orders, column=self._shown_column("quantity"))
            problems += bad
            orders = orders.with_columns(values.alias("quantity"))
        return orders

    def _add_extra(self, orders: pl.DataFrame, cells: pl.DataFrame) -> pl.DataFrame:
        """没有用到的来源列放进 extra，一个 JSON 对象。"""
        if not self._unused:
            return orders.select(ROW_NUMBER, *self.columns)
        extra = cells.select(ROW_NUMBER, pl.struct(self._unused).struct.json_encode().alias("extra"))
        return orders.join(extra, on=ROW_NUMBER, how="left", maintain_order="left").select(ROW_NUMBER, *self.columns)

    def _compute(self, query: pl.LazyFrame, name: str) -> pl.DataFrame:
        """表达式是人写的：算不出时指出是哪一个。"""
        try:
            return query.collect(engine="in-memory")
        except pl.exceptions.PolarsError as error:
            reason = str(error).strip().splitlines()[0]
            raise ImportFileError(
                self.source.path, f"{name} cannot be computed ({reason})", advice="correct its expression in the profile"
            ) from error

    def _shown_column(self, name: str) -> str:
        """消息里的列名：直接读的是来源的列，算出来的是 raw_orders 的列。"""
        target = self.mapping.targets[name]
        roots = self.mapping.sources[name].meta.root_names()
        return roots[0] if target.column is not None else name


def _lone_row(by: tuple[str, ...]) -> pl.Expr:
    """键不全的行不能与别的行合并，各成一单。"""
    return pl.when(pl.any_horizontal(pl.col(name).is_null() for name in by)).then(pl.col(ROW_NUMBER))


def _aggregate(name: str, target: TextTarget) -> pl.Expr:
    """空值不参与；全空还是空。"""
    values = pl.col(name)
    match target.aggregate:
        case "first":
            return values.first(ignore_nulls=True)
        case "last":
            return values.last(ignore_nulls=True)
        case "sum":
            return pl.when(values.count() > 0).then(values.sum())
        case "min":
            return values.min()
        case "max":
            return values.max()


def _find_companions(lines: pl.DataFrame, bad: pl.DataFrame) -> pl.DataFrame:
    """坏行所在订单的其余各行：少了一行的订单金额不对，整单都不导入。"""
    keys = [name for name in lines.columns if name.startswith(_KEY)]
    bad_orders = (
        lines.join(bad, on=ROW_NUMBER, how="semi")
        .select(*keys, pl.col(ROW_NUMBER).alias("bad row"))
        .unique(keys, keep="first", maintain_order=True)
    )
    companions = lines.join(bad_orders, on=keys, how="inner", nulls_equal=True, maintain_order="left")
    problem = pl.format("belongs to the same order as the bad row {}", pl.col("bad row"))
    return find_problems(companions, pl.lit(value=True), column="", problem=problem, value=None)
