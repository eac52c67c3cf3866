"""来源的行 → raw_orders 的行：取值、换类型、按订单合并商品行，坏行分出来。"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl

from bridge.imports.cells import CellBlock, Source
from bridge.imports.conventions import Conventions, GivenConventions, SeenTargets, is_number
from bridge.imports.conversion import (
    convert_formatted_times,
    convert_numbers,
    convert_times,
    finish_amount,
    finish_quantity,
    read_expression_numbers,
)
from bridge.imports.errors import ImportFileError
from bridge.imports.lost_cells import RoundedIds, find_error_values, find_rounded, unprotect
from bridge.imports.mapping import ColumnMapping
from bridge.imports.numbers import SeenNumbers
from bridge.imports.problems import PROBLEMS, find_problems, merge_problems
from bridge.imports.profile import ROW_NUMBER, AmountTarget, TextTarget, TimeTarget

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
    given: GivenConventions = field(default_factory=GivenConventions)

    @cached_property
    def conventions(self) -> Conventions:
        return Conventions(self.source, self.mapping, self.given)

    @cached_property
    def _rounded_ids(self) -> RoundedIds:
        return RoundedIds(self.source.path, self.mapping.shown_column("order_id"))

    @property
    def columns(self) -> tuple[str, ...]:
        """写进 raw_orders 的列。"""
        return (*self.mapping.targets, *(("extra",) if self._unused else ()))

    @property
    def _unused(self) -> list[str]:
        return [name for name in self.source.columns if name not in self.mapping.used] if self.mapping.profile.keep_extra else []

    def build(self, block: CellBlock) -> OrderBlock:
        """一块单元格变成订单；要合并时，整个文件必须是一块。"""
        group = self.mapping.profile.group
        problems = self._find_bad(block)
        bad_rows = merge_problems(problems)[ROW_NUMBER]
        cells = block.cells.with_columns(unprotect(block.cells[name]) for name in self._ids)
        cells = _blank(cells, self.conventions.cells, bad_rows)
        seen_cells = self.conventions.observe_cells(cells)
        self._settle()
        table = self._read_cells(cells, seen_cells, problems)
        raw = _blank(self._evaluate(table, self._by_line), [*self.conventions.targets, "order_id"], bad_rows)
        seen = self.conventions.observe(raw)
        self._settle()
        lines = self._convert(raw, seen, self._by_line, problems)
        if group:
            keys = [pl.col(name).alias(f"{_KEY}{name}") for name in group.by]
            lines = lines.with_columns(table.select(*keys, _lone_row(group.by).alias(_KEY)))
        orders = self._finish(self._group(lines, table, problems) if group else lines, problems)
        bad = merge_problems(problems)
        if group and bad.height:
            bad = merge_problems([bad, _find_companions(lines, bad)])
        return OrderBlock(self._add_extra(orders.join(bad, on=ROW_NUMBER, how="anti", maintain_order="left"), block.cells), bad)

    def finish(self) -> None:
        """读到底之后才看得出的毛病。

        :raises ImportFileError: 订单号被表格软件舍入过。
        """
        self._rounded_ids.check()

    @property
    def _by_line(self) -> dict[str, TextTarget]:
        return {name: target for name, target in self.mapping.targets.items() if target.aggregate_expression is None}

    def _find_bad(self, block: CellBlock) -> list[pl.DataFrame]:
        """不看值就知道的坏行。"""
        used = {*self.mapping.used, *self.mapping.profile.file.numbers}
        return [block.find_missing(self.source.columns, used), *block.problems]

    def _settle(self) -> None:
        """有列还定不下来，就先把整个文件看一遍，定下来为止。

        :raises ImportFileError: 看完也定不下来：要人说。
        """
        if not self.conventions.open_columns():
            return
        for block in self.source.reread():
            bad_rows = merge_problems(self._find_bad(block))[ROW_NUMBER]
            cells = _blank(block.cells, self.conventions.cells, bad_rows)
            seen = self.conventions.observe_cells(cells)
            raw = self._evaluate(self._read_cells(cells, seen, []), self._by_line)
            self.conventions.observe(_blank(raw, self.conventions.targets, bad_rows))
            if not self.conventions.open_columns():
                return
        raise self.conventions.open_columns()[0].ask()

    def _read_cells(self, cells: pl.DataFrame, seen: Mapping[str, SeenNumbers], problems: list[pl.DataFrame]) -> pl.DataFrame:
        """表达式要用的列换成数。"""
        numbers: list[pl.Series] = []
        for name, column in self.conventions.cells.items():
            values, unreadable = read_expression_numbers(cells, name, column, seen[name])
            numbers.append(values)
            problems += [find_error_values(cells, name, name), unreadable]
        return cells.with_columns(numbers)

    def _evaluate(self, table: pl.DataFrame, targets: dict[str, TextTarget]) -> pl.DataFrame:
        columns = [self._compute(table.lazy().select(ROW_NUMBER, self.mapping.sources[name].alias(name)), name) for name in targets]
        return pl.DataFrame([table[ROW_NUMBER], *(column[name] for column, name in zip(columns, targets, strict=True))])

    def _convert(
        self, raw: pl.DataFrame, seen: SeenTargets, targets: Mapping[str, TextTarget], problems: list[pl.DataFrame]
    ) -> pl.DataFrame:
        """逐列换类型；坏行记进 problems。"""
        converted: list[pl.Series] = []
        for name, target in targets.items():
            column = self.mapping.shown_column(name)
            if raw[name].dtype == pl.String:
                problems.append(find_error_values(raw, name, column))
            if isinstance(target, TimeTarget):
                values, unreadable = self._convert_times(raw, name, target, seen)
            elif is_number(name, target):
                values, unreadable = convert_numbers(raw, name, column, self.conventions.numbers[name], seen.numbers.get(name))
            else:
                values, unreadable = self._convert_text(raw, name, column)
            converted.append(values.alias(name))
            problems.append(unreadable)
        return raw.with_columns(converted)

    def _convert_times(self, raw: pl.DataFrame, name: str, target: TimeTarget, seen: SeenTargets) -> tuple[pl.Series, pl.DataFrame]:
        zone = self.given.time_zone or target.time_zone or self.time_zone
        column = self.mapping.shown_column(name)
        if name in seen.times:
            return convert_times(raw, name, column, self.conventions.times[name], seen.times[name], zone)
        return convert_formatted_times(raw, name, column, target.format, zone, also_iso=self.source.is_spreadsheet)

    def _convert_text(self, raw: pl.DataFrame, name: str, column: str) -> tuple[pl.Series, pl.DataFrame]:
        value = pl.col(name).cast(pl.String)
        text = raw.select(ROW_NUMBER, pl.when(value != "").then(value))
        if name == "order_id":
            self._rounded_ids.observe(text[ROW_NUMBER], text[name])
        is_id = name in ("order_id", "customer_name")
        return text[name], find_rounded(text, name, column) if is_id else pl.DataFrame(schema=PROBLEMS)

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
        seen = self.conventions.observe(orders.select(ROW_NUMBER, *by_order))
        if self.conventions.open_columns():
            raise self.conventions.open_columns()[0].ask()
        return self._convert(orders, seen, by_order, problems)

    def _finish(self, orders: pl.DataFrame, problems: list[pl.DataFrame]) -> pl.DataFrame:
        """金额与数量收尾成表里的类型。"""
        amount = self.mapping.targets.get("amount")
        if isinstance(amount, AmountTarget):
            values, bad = finish_amount(orders, amount, column=self.mapping.shown_column("amount"))
            problems += bad
            orders = orders.with_columns(values.alias("amount"))
        if "quantity" in self.mapping.targets:
            values, bad = finish_quantity(orders, column=self.mapping.shown_column("quantity"))
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

    @cached_property
    def _ids(self) -> frozenset[str]:
        """是号码、或用来算号码的来源列。"""
        order_id = self.mapping.sources.get("order_id")
        roots = order_id.meta.root_names() if order_id is not None else []
        by = self.mapping.profile.group.by if self.mapping.profile.group else ()
        return frozenset({*roots, *by} - {ROW_NUMBER})


def _blank(frame: pl.DataFrame, columns: Collection[str], bad_rows: pl.Series) -> pl.DataFrame:
    """字段错了位之类的坏行，其中的值不作写法的证据。"""
    if not bad_rows.len():
        return frame
    is_bad = pl.col(ROW_NUMBER).is_in(bad_rows.implode())
    return frame.with_columns(pl.when(~is_bad).then(name).alias(name) for name in columns if name in frame.columns)


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
