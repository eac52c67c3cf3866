"""来源的行 → raw_orders 的行：取值、换类型、按订单合并商品行，坏行分出来。"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import polars as pl

from bridge.imports.files.cells import CellBlock, Source
from bridge.imports.orders.conventions import Conventions, GivenConventions, SeenTargets, is_number
from bridge.imports.orders.conversion import (
    convert_formatted_times,
    convert_numbers,
    convert_times,
    finish_amount,
    finish_quantity,
    read_expression_numbers,
)
from bridge.imports.orders.items import ItemLines, MergedColumn, Merging, aggregate
from bridge.imports.orders.lost_cells import (
    RoundedIds,
    find_dates,
    find_error_values,
    find_rounded,
    unprotect,
    without_apostrophe,
)
from bridge.imports.orders.mapping import ColumnMapping
from bridge.imports.orders.statuses import Statuses
from bridge.imports.rules.currencies import COLUMNS, CurrencyColumn
from bridge.imports.rules.errors import ImportFileError, ProfileError
from bridge.imports.rules.numbers import SeenNumbers
from bridge.imports.rules.problems import PROBLEMS, find_problems, merge_problems
from bridge.imports.rules.profile import ROW_NUMBER, AmountTarget, LineRule, TextTarget, TimeTarget, check_lines

ORDER_KEY = ("order_id", "shop")
_KEY = "group key "


@dataclass(frozen=True)
class OrderBlock:
    """一块的结果。orders 每行一个订单：行号（合并的取第一行）与 raw_orders 的列；problems 每个坏行一条；merged：看着值合的各列。"""

    orders: pl.DataFrame
    problems: pl.DataFrame
    merged: Sequence[MergedColumn] = ()


@dataclass(frozen=True)
class LineBlock:
    """一块里的各行：table 是表达式要用的原文与数，lines 是换过类型的。"""

    table: pl.DataFrame
    lines: pl.DataFrame
    problems: list[pl.DataFrame]


@dataclass(frozen=True)
class OrderBuilder:
    """一个文件的取值规则；time_zone 用于没有时区的时间。"""

    source: Source
    mapping: ColumnMapping
    time_zone: str
    given: GivenConventions = field(default_factory=GivenConventions)
    lines: LineRule | None = None
    statuses: Statuses = field(default_factory=Statuses)

    def __post_init__(self) -> None:
        """:raises ProfileError: lines 与配置矛盾，或没有订单号可合。"""
        try:
            check_lines(self.mapping.profile, self.lines)
        except ValueError as error:
            raise ProfileError(f"{error}") from error
        if self.lines == "items" and "order_id" not in self.targets_by_line:
            raise ProfileError('lines = "items" needs a column for order_id: lines of one order have the same')

    @cached_property
    def conventions(self) -> Conventions:
        return Conventions(self.source, self.mapping, self.given)

    @cached_property
    def _rounded_ids(self) -> RoundedIds:
        return RoundedIds(self.source.path, self.mapping.shown_column("order_id"))

    @cached_property
    def _currency(self) -> CurrencyColumn | None:
        """写着货币的列；金额由它算出的（表达式里有它），几种都行。"""
        amount = self.mapping.sources.get("amount")
        if amount is None:
            return None
        read = set(amount.meta.root_names())
        names = [name for name in self.source.columns if name.strip().casefold() in COLUMNS and name not in read]
        return CurrencyColumn(self.source.path, names[0]) if names else None

    @property
    def columns(self) -> tuple[str, ...]:
        """写进 raw_orders 的列。"""
        return (*self.mapping.targets, *(("extra",) if self._unused else ()))

    @property
    def _unused(self) -> list[str]:
        known = self.mapping.used | self.source.added
        return [name for name in self.source.columns if name not in known] if self.mapping.profile.keep_extra else []

    @property
    def merges(self) -> bool:
        """几行合成一个订单：它们可以相隔很远，所以整个文件必须是一块。"""
        return self.mapping.profile.group is not None or self.lines == "items"

    def build(self, block: CellBlock) -> OrderBlock:
        """一块单元格变成订单；要合并时，整个文件必须是一块。"""
        if self._currency:
            self._currency.observe(block.cells[ROW_NUMBER], block.cells[self._currency.name])
        read = self.read_lines(block, self.targets_by_line)
        problems, lines = read.problems, read.lines
        merged: Sequence[MergedColumn] = ()
        if self.merges:
            keys = self._keys(read)
            lines = lines.with_columns(keys)
            orders, merged = self._group(*self._leave_out(lines, read.table.with_columns(keys)), problems)
        else:
            orders = lines
        orders = self._finish(orders, problems)
        bad = merge_problems(problems)
        if self.merges and bad.height:
            bad = merge_problems([bad, _find_companions(lines, bad)])
        good = orders.join(bad, on=ROW_NUMBER, how="anti", maintain_order="left")
        return OrderBlock(self._add_extra(good, block.cells), bad, merged)

    def without_unused(self, block: CellBlock) -> CellBlock:
        """只留算得到的列。"""
        used = {*self.mapping.used, *self.mapping.profile.file.numbers}
        used |= {self._currency.name} if self._currency else set()
        return replace(
            block, cells=block.cells.select(ROW_NUMBER, *(name for name in self.source.columns if name in used))
        )

    def read_lines(self, block: CellBlock, targets: Mapping[str, TextTarget]) -> LineBlock:
        """一块单元格的这几个 target，一行一行，还没有合成订单。"""
        problems = self._find_bad(block)
        bad_rows = merge_problems(problems)[ROW_NUMBER]
        cells = _blank(self._clean(block.cells), self.conventions.cells, bad_rows)
        seen_cells = self.conventions.observe_cells(cells)
        self._settle()
        table = self._read_cells(cells, seen_cells, problems)
        raw = _blank(self._evaluate(table, targets), [*self.conventions.targets, "order_id"], bad_rows)
        seen = self.conventions.observe(raw)
        self._settle()
        return LineBlock(table, self._convert(raw, seen, targets, problems), problems)

    def read_numbers(self, block: CellBlock) -> pl.DataFrame:
        """一块里好的行的订单号与店。"""
        targets = {name: target for name, target in self.targets_by_line.items() if name in ORDER_KEY}
        read = self.read_lines(block, targets)
        return read.lines.join(merge_problems(read.problems), on=ROW_NUMBER, how="anti", maintain_order="left")

    def plan_items(self, lines: pl.DataFrame, keys: Sequence[str], bad: pl.DataFrame) -> Merging:
        """商品行怎样合成订单；坏行所在的订单不作证据。"""
        evidence = lines
        if bad.height:
            bad_orders = lines.join(bad, on=ROW_NUMBER, how="semi").select(keys)
            evidence = lines.join(bad_orders, on=keys, how="anti", nulls_equal=True, maintain_order="left")
        return ItemLines(
            self.source.path, self.mapping, self.statuses, lines=lines, evidence=evidence, keys=keys
        ).plan()

    def finish(self) -> None:
        """读到底之后才看得出的毛病。

        :raises ImportFileError: 订单号被表格软件舍入过。
        """
        if "order_id" in self.mapping.targets:
            self._rounded_ids.check()

    @property
    def targets_by_line(self) -> dict[str, TextTarget]:
        return {name: target for name, target in self.mapping.targets.items() if target.aggregate_expression is None}

    def _find_bad(self, block: CellBlock) -> list[pl.DataFrame]:
        """不看值就知道的坏行。"""
        used = {*self.mapping.used, *self.mapping.profile.file.numbers} - self.source.added
        return [block.find_missing(self.source.columns, used), *block.problems]

    def _clean(self, cells: pl.DataFrame) -> pl.DataFrame:
        """号码去掉保护；表达式要比的文字两边没有空白（抖店的每一格后面都有制表符），全是空白的是 NULL。"""
        ids = cells.with_columns(unprotect(cells[name]) for name in self._ids)
        bare = {name: pl.col(name).str.strip_chars() for name in self._computed if name in cells.columns}
        return ids.with_columns(pl.when(text != "").then(text).alias(name) for name, text in bare.items())

    def _settle(self) -> None:
        """有列还定不下来，就先把整个文件看一遍，定下来为止。

        :raises ImportFileError: 看完也定不下来：要人说。
        """
        if not self.conventions.open_columns():
            return
        for block in self.source.reread():
            bad_rows = merge_problems(self._find_bad(block))[ROW_NUMBER]
            cells = _blank(self._clean(block.cells), self.conventions.cells, bad_rows)
            seen = self.conventions.observe_cells(cells)
            raw = self._evaluate(self._read_cells(cells, seen, []), self.targets_by_line)
            self.conventions.observe(_blank(raw, self.conventions.targets, bad_rows))
            if not self.conventions.open_columns():
                return
        raise self.conventions.open_columns()[0].ask()

    def _read_cells(
        self, cells: pl.DataFrame, seen: Mapping[str, SeenNumbers], problems: list[pl.DataFrame]
    ) -> pl.DataFrame:
        """表达式要用的列换成数。"""
        numbers: list[pl.Series] = []
        for name, column in self.conventions.cells.items():
            values, unreadable = read_expression_numbers(cells, name, column, seen[name])
            numbers.append(values)
            problems += [find_error_values(cells, name, name), unreadable]
        return cells.with_columns(numbers)

    def _evaluate(self, table: pl.DataFrame, targets: Mapping[str, TextTarget]) -> pl.DataFrame:
        columns = [
            self._compute(table.lazy().select(ROW_NUMBER, self.mapping.sources[name].alias(name)), name)
            for name in targets
        ]
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
                values, unreadable = convert_numbers(
                    raw, name, column, self.conventions.numbers[name], seen.numbers.get(name)
                )
            else:
                values, unreadable = self._convert_text(raw, name, column)
            converted.append(values.alias(name))
            problems.append(unreadable)
        return raw.with_columns(converted)

    def _convert_times(
        self, raw: pl.DataFrame, name: str, target: TimeTarget, seen: SeenTargets
    ) -> tuple[pl.Series, pl.DataFrame]:
        zone = self.given.time_zone or target.time_zone or self.time_zone
        column = self.mapping.shown_column(name)
        if name in seen.times:
            return convert_times(raw, name, column, self.conventions.times[name], seen.times[name], zone)
        return convert_formatted_times(raw, name, column, target.formats, zone, also_iso=self.source.is_spreadsheet)

    def _convert_text(self, raw: pl.DataFrame, name: str, column: str) -> tuple[pl.Series, pl.DataFrame]:
        value = pl.col(name).cast(pl.String)
        text = raw.select(ROW_NUMBER, pl.when(value != "").then(without_apostrophe(value)))
        if name == "order_id":
            self._rounded_ids.observe(text[ROW_NUMBER], text[name])
        if name not in ("order_id", "customer_name"):
            return text[name], pl.DataFrame(schema=PROBLEMS)
        dates = find_dates(text, name, column, partial(self.source.numeric_rows, column))
        return text[name], pl.concat([find_rounded(text, name, column), dates])

    def _keys(self, read: LineBlock) -> list[pl.Series]:
        """值相同的行是一单。"""
        by = self.mapping.group_by
        keys = read.table.select(by) if by else trim_key(read.lines)
        lone = read.lines.select(ROW_NUMBER).hstack(keys).select(_lone_row(by or ("order_id",)).alias(_KEY))
        return [keys[name].alias(f"{_KEY}{name}") for name in keys.columns] + [lone.to_series()]

    def _leave_out(self, lines: pl.DataFrame, table: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """去掉一单里不计的行；整单都不计时照旧。"""
        condition = self.mapping.leave_out
        if condition is None:
            return lines, table
        left_out = self._compute(table.lazy().select(condition.fill_null(value=False).alias("left out")), "leave_out")
        keys = [name for name in lines.columns if name.startswith(_KEY)]
        counted = (
            lines.with_columns(left_out).select(~pl.col("left out") | pl.col("left out").all().over(keys)).to_series()
        )
        return lines.filter(counted), table.filter(counted)

    def _group(
        self, lines: pl.DataFrame, table: pl.DataFrame, problems: list[pl.DataFrame]
    ) -> tuple[pl.DataFrame, Sequence[MergedColumn]]:
        """同一订单的商品行合成一行，按第一行的先后。"""
        keys = [name for name in lines.columns if name.startswith(_KEY)]
        by_order = {
            name: target for name, target in self.mapping.targets.items() if target.aggregate_expression is not None
        }
        if self.lines == "items":
            plan = self.plan_items(lines, keys, merge_problems(problems))
            if plan.problem:
                raise plan.problem
        else:
            self._check_taken_once(lines, keys)
            plan = Merging(
                lines, {name: aggregate(name, target.aggregate) for name, target in self.targets_by_line.items()}
            )
        grouped = plan.lines.lazy().group_by(keys, maintain_order=True)
        orders = self._compute(grouped.agg(pl.col(ROW_NUMBER).first(), **plan.expressions), "[group]")
        if not by_order:
            return orders, plan.columns
        by_key = table.lazy().group_by(keys, maintain_order=True)
        for name in by_order:
            values = self._compute(by_key.agg(self.mapping.sources[name].alias(name)), name)
            if isinstance(values[name].dtype, pl.List):
                problem = f"the aggregate_expression of {name} gives several values per order"
                raise ImportFileError(self.source.path, problem, advice="use SUM, MAX, FIRST … in it")
            orders = orders.with_columns(values[name])
        seen = self.conventions.observe(orders.select(ROW_NUMBER, *by_order))
        if self.conventions.open_columns():
            raise self.conventions.open_columns()[0].ask()
        return self._convert(orders, seen, by_order, problems), plan.columns

    def _check_taken_once(self, lines: pl.DataFrame, keys: Sequence[str]) -> None:
        """配置没有说怎样合的金额与数量，一单的各行要一样：不一样时取哪一行都是猜。

        :raises ImportFileError: 不一样。
        """
        for name, target in self.targets_by_line.items():
            if not is_number(name, target) or "aggregate" in target.model_fields_set:
                continue
            different = lines.drop_nulls(name).filter(pl.col(name).n_unique().over(keys) > 1)
            if different.height:
                order = different.join(different.head(1), on=keys, how="semi", nulls_equal=True)
                (first_row, first), (row, value) = (
                    order.select(ROW_NUMBER, name).unique(name, keep="first", maintain_order=True).rows()[:2]
                )
                raise ImportFileError(
                    self.source.path,
                    f"differs from {first.normalize():f} in row {first_row} of the same order, and the profile does not say what its lines make",
                    row=row,
                    column=self.mapping.shown_column(name),
                    value=f"{value.normalize():f}",
                    advice=f'say it: {name} = {{ …, aggregate = "sum" }}, or "first", "max" …',
                )

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
                self.source.path,
                f"{name} cannot be computed ({reason})",
                advice="correct its expression in the profile",
            ) from error

    @cached_property
    def _computed(self) -> frozenset[str]:
        """表达式读的来源列。"""
        targets = self.mapping.targets.items()
        read = [self.mapping.sources[name] for name, target in targets if target.column is None]
        read += [] if self.mapping.leave_out is None else [self.mapping.leave_out]
        return frozenset({root for expression in read for root in expression.meta.root_names()} - {ROW_NUMBER})

    @cached_property
    def _ids(self) -> frozenset[str]:
        """是号码、或用来算号码的来源列。"""
        order_id = self.mapping.sources.get("order_id")
        roots = order_id.meta.root_names() if order_id is not None else []
        return frozenset({*roots, *self.mapping.group_by} - {ROW_NUMBER})


def trim(lines: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """这几列文字，照 ETL 那样修剪；文件没有的列不在内。"""
    return lines.select(pl.col(name).str.strip_chars() for name in names if name in lines.columns)


def trim_key(lines: pl.DataFrame) -> pl.DataFrame:
    """ETL 认订单的那两列；修剪完是空的就没有。"""
    keys = trim(lines, ORDER_KEY)
    return keys.select(pl.when(pl.col(name) != "").then(name).alias(name) for name in keys.columns)


def _blank(frame: pl.DataFrame, columns: Collection[str], bad_rows: pl.Series) -> pl.DataFrame:
    """字段错了位之类的坏行，其中的值不作写法的证据。"""
    if not bad_rows.len():
        return frame
    is_bad = pl.col(ROW_NUMBER).is_in(bad_rows.implode())
    return frame.with_columns(pl.when(~is_bad).then(name).alias(name) for name in columns if name in frame.columns)


def _lone_row(by: tuple[str, ...]) -> pl.Expr:
    """键不全的行不能与别的行合并，各成一单。"""
    return pl.when(pl.any_horizontal(pl.col(name).is_null() for name in by)).then(pl.col(ROW_NUMBER))


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
