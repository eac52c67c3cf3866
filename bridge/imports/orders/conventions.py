"""一个文件里每列数、每列时刻的写法：边读边看，看不出时先把后面的块看一遍再读。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import polars as pl

from bridge.imports.files.cells import Source
from bridge.imports.orders.mapping import ColumnMapping
from bridge.imports.rules.errors import ColumnReading, ProfileError
from bridge.imports.rules.numbers import DecimalMark, NumberColumn, SeenNumbers
from bridge.imports.rules.profile import ROW_NUMBER, AmountTarget, TextTarget, TimeTarget
from bridge.imports.rules.times import DateOrder, SeenTimes, TimeColumn


@dataclass(frozen=True, kw_only=True)
class GivenConventions:
    """命令行里说了的写法，盖过配置；没说的由值来定。"""

    decimal: DecimalMark | None = None
    date_order: DateOrder | None = None
    time_zone: str | None = None


@dataclass(frozen=True)
class SeenTargets:
    """一块里各列的值，按写法看过一遍。"""

    numbers: Mapping[str, SeenNumbers]
    times: Mapping[str, SeenTimes]


class Conventions:
    """各列的写法。

    :ivar cells: 表达式要用的来源列（numbers）。
    :ivar numbers: amount 与 quantity。
    :ivar times: ordered_at；给了 format 的不在内。
    """

    def __init__(self, source: Source, mapping: ColumnMapping, given: GivenConventions) -> None:
        path, decimal = source.path, given.decimal or mapping.profile.file.decimal
        self.cells = {
            name: NumberColumn(path, name, decimal, partial(source.numeric_rows, name))
            for name in mapping.profile.file.numbers
        }
        self.numbers: dict[str, NumberColumn] = {}
        self.times: dict[str, TimeColumn] = {}
        for name, target in mapping.targets.items():
            if is_number(name, target):
                column = mapping.shown_column(name)
                self.numbers[name] = NumberColumn(path, column, decimal, partial(source.numeric_rows, column))
            elif isinstance(target, TimeTarget) and target.format is None:
                order = given.date_order or target.date_order
                self.times[name] = TimeColumn(path, mapping.shown_column(name), order, starts_1904=source.starts_1904)
            elif isinstance(target, TimeTarget) and given.date_order is not None:
                raise ProfileError(
                    f"--{given.date_order}: the profile gives {name} a format, which has an order of its own; leave one out"
                )

    def observe_cells(self, cells: pl.DataFrame) -> dict[str, SeenNumbers]:
        return {name: column.observe(cells[ROW_NUMBER], cells[name]) for name, column in self.cells.items()}

    def observe(self, raw: pl.DataFrame) -> SeenTargets:
        """看 raw 里有的各列；算出来已经是数、是时刻的不必看。"""
        rows, kinds = raw[ROW_NUMBER], raw.schema
        numbers = [name for name in self.numbers if kinds.get(name) == pl.String]
        times = [name for name in self.times if name in kinds and not kinds[name].is_temporal()]
        return SeenTargets(
            {name: self.numbers[name].observe(rows, raw[name]) for name in numbers},
            {name: self.times[name].observe(rows, raw[name].cast(pl.String)) for name in times},
        )

    @property
    def targets(self) -> list[str]:
        return [*self.numbers, *self.times]

    def open_columns(self) -> list[NumberColumn | TimeColumn]:
        return [column for column in self._all() if column.is_open]

    def describe(self) -> list[ColumnReading]:
        """与平常不同的写法，各列为什么。"""
        found: list[ColumnReading] = []
        for column in self._all():
            found += column.describe()
        return found

    def _all(self) -> Iterator[NumberColumn | TimeColumn]:
        yield from self.cells.values()
        yield from self.numbers.values()
        yield from self.times.values()


def is_number(name: str, target: TextTarget) -> bool:
    return isinstance(target, AmountTarget) or name == "quantity"
