"""两个 schema 里结果表的比较：比什么、结果是什么、怎样比。只读，一个快照。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from etl_assets.comparison.queries import Pair, count_differences, count_rows, sample_differences
from etl_assets.comparison.sides import Catalog, Scope, business_key, compared_columns, read_catalog, select_side
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.settings import EtlSettings

_WORK_MEMORY = "128MB"  # 一百万行的散列表放得下；缺省的 4 MB 要写几百兆临时文件

Key = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """比什么、怎样算相同。容差是绝对值：tolerance 用于金额，time_tolerance_seconds 用于时刻；0 是一丝不差。"""

    left: str
    right: str
    tables: Sequence[str] = field(default_factory=lambda: tuple(descriptions()))
    since: date | None = None
    tolerance: Decimal = Decimal(0)
    time_tolerance_seconds: Decimal = Decimal(0)
    ignored: Sequence[str] = ()
    samples: int = 10


@dataclass(frozen=True)
class ColumnDifferences:
    """两边都有的行里，一列有多少个值不同；数与时刻还有最大的差（时刻以秒计，一边是 NULL 的不算）。"""

    column: str
    differing: int
    largest_difference: Decimal | None


@dataclass(frozen=True)
class ValueSample:
    """一个不同的值，PostgreSQL 写成的文字；None 是 NULL。"""

    key: Key
    column: str
    left: str | None
    right: str | None


@dataclass(frozen=True)
class Samples:
    """按键排序的前几个：只有左边有的、只有右边有的，以及每一列的不同的值。"""

    missing: Sequence[Key] = ()
    extra: Sequence[Key] = ()
    differing: Sequence[ValueSample] = ()


@dataclass(frozen=True, kw_only=True)
class TableComparison:
    """一张表的结果：missing 只有左边有，extra 只有右边有，differing 两边都有而至少一列不同。"""

    table: str
    rows_left: int
    rows_right: int
    missing: int
    extra: int
    differing: int
    columns: Sequence[ColumnDifferences]
    samples: Samples

    @property
    def equal(self) -> bool:
        return not (self.missing or self.extra or self.differing)

    @property
    def equal_rows(self) -> int:
        return self.rows_left - self.missing - self.differing

    @property
    def equal_share(self) -> float:
        """相同的行占两边合起来的行的份额；一行也没有是 1。"""
        rows = self.rows_left + self.extra
        return self.equal_rows / rows if rows else 1.0


@dataclass(frozen=True)
class Comparison:
    """整个比较的结果；compared_at 是快照的时刻。"""

    request: ComparisonRequest
    compared_at: datetime
    tables: Sequence[TableComparison]

    @property
    def equal(self) -> bool:
        return all(table.equal for table in self.tables)


def compare_schemas(engine: sa.Engine, settings: EtlSettings, request: ComparisonRequest) -> Comparison:
    """比较两个 schema。一侧缺东西或没法比时抛 NotComparableError；什么也不写。"""
    with (
        translated_errors(),
        engine.connect().execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True) as connection,
        connection.begin(),
    ):
        connection.execute(sa.select(sa.func.set_config("work_mem", _WORK_MEMORY, True)))
        compared_at = connection.execute(sa.select(sa.func.now())).scalar_one()
        catalog = read_catalog(connection, (request.left, request.right))
        scope = None if request.since is None else Scope(request.since, settings.timezone)
        pairs = {table: _pair(catalog, request, table, scope) for table in request.tables}  # 都能比，才开始比
        tables = [_compare(connection, table, pair, samples=request.samples) for table, pair in pairs.items()]
    return Comparison(request, compared_at, tables)


def _pair(catalog: Catalog, request: ComparisonRequest, table: str, scope: Scope | None) -> Pair:
    compared = [column for column in compared_columns(table) if column.name not in request.ignored]
    names = [column.name for column in compared]
    return Pair(
        left=select_side(catalog, request.left, table, columns=names, scope=scope).subquery("left_side"),
        right=select_side(catalog, request.right, table, columns=names, scope=scope).subquery("right_side"),
        key=business_key(table),
        compared=compared,
        tolerance=request.tolerance,
        time_tolerance_seconds=request.time_tolerance_seconds,
    )


def _compare(connection: sa.Connection, table: str, pair: Pair, *, samples: int) -> TableComparison:
    rows = connection.execute(count_rows(pair)).one()
    paired_left, paired_right, *counts = connection.execute(count_differences(pair)).one()
    if (paired_left, paired_right) != tuple(rows):
        # 配成的行比有的多：键有重复（没有唯一约束的表或视图）。编号要排序，所以不重复的不编
        pair = pair.numbered()
        _, _, *counts = connection.execute(count_differences(pair)).one()
    rows_left, rows_right, rows_both, differing, *per_column = counts
    found = zip(pair.columns, per_column[::2], per_column[1::2], strict=True)
    counted = TableComparison(
        table=table,
        rows_left=rows_left,
        rows_right=rows_right,
        missing=rows_left - rows_both,
        extra=rows_right - rows_both,
        differing=differing,
        columns=[ColumnDifferences(column.name, count, largest) for column, count, largest in found],
        samples=Samples(),
    )
    if counted.equal or not samples:
        return counted
    return replace(counted, samples=_read_samples(connection, pair, counted, limit=samples))


def _read_samples(connection: sa.Connection, pair: Pair, counted: TableComparison, *, limit: int) -> Samples:
    different = [paired for paired, column in zip(pair.columns, counted.columns, strict=True) if column.differing]
    statement = sample_differences(
        pair, missing=counted.missing > 0, extra=counted.extra > 0, columns=different, limit=limit
    )
    missing: list[Key] = []
    extra: list[Key] = []
    values = []
    for position, *key_values, left, right in connection.execute(statement):
        key = dict(zip(pair.key, key_values, strict=True))
        if position < 2:
            (missing, extra)[position].append(key)
        else:
            values.append(ValueSample(key, different[position - 2].name, left, right))
    return Samples(missing, extra, values)
