"""三张结果表与被拒的行，以及两份结果之间的差别。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# 列名 → 值：UUID、Decimal、datetime（UTC）、date、int、str 或 None；不含 created_at 与 updated_at
Row = dict[str, Any]

# 表 → 主键，差别按它配对
PRIMARY_KEYS = {
    "orders": ("shop_id", "order_id"),
    "customers": ("customer_global_id",),
    "leads": ("lead_id",),
    "rejected": ("raw_id",),
}
# 表 → 给人看的次序
_SORT_KEYS = {
    "orders": ("shop_id", "order_id"),
    "customers": ("customer_key", "customer_global_id"),
    "leads": ("customer_global_id", "lead_no", "lead_id"),
    "rejected": ("raw_id",),
}
_SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class Result:
    """各表的行，按键排好。"""

    orders: list[Row]
    customers: list[Row]
    leads: list[Row]
    rejected: list[Row]

    def __post_init__(self) -> None:
        for table, columns in _SORT_KEYS.items():
            getattr(self, table).sort(
                key=lambda row, columns=columns: [(row[column] is not None, row[column]) for column in columns]
            )


def differences(expected: Result, actual: Result) -> list[str]:
    """每张表最前面的若干处差别，一处一句；完全相等则为空。"""
    found: list[str] = []
    for table in PRIMARY_KEYS:
        sentences = list(_compare(table, getattr(expected, table), getattr(actual, table)))
        found += sentences[:_SHOWN_DIFFERENCES]
        if len(sentences) > _SHOWN_DIFFERENCES:
            found.append(f"{table}: {len(sentences) - _SHOWN_DIFFERENCES} more differences")
    return found


def _compare(table: str, expected: Sequence[Row], actual: Sequence[Row]) -> Iterator[str]:
    wanted = {_key(table, row): row for row in expected}
    present = {_key(table, row): row for row in actual}
    for name, rows, by_key in (("expected", expected, wanted), ("actual", actual, present)):
        if len(rows) != len(by_key):
            yield f"{table}: {len(rows) - len(by_key)} {name} rows repeat the key of another"
    for key, row in wanted.items():
        if key not in present:
            yield f"{table} {_show(key)}: missing, expected {_show_row(row)}"
            continue
        for column in sorted(row.keys() | present[key].keys()):
            if column not in row or column not in present[key]:
                yield f"{table} {_show(key)}: column {column} is on one side only"
            elif row[column] != present[key][column]:
                yield f"{table} {_show(key)}: {column} is {present[key][column]!r}, expected {row[column]!r}"
    for key, row in present.items():
        if key not in wanted:
            yield f"{table} {_show(key)}: extra, found {_show_row(row)}"


def _key(table: str, row: Row) -> tuple[Any, ...]:
    return tuple(row[column] for column in PRIMARY_KEYS[table])


def _show(key: tuple[Any, ...]) -> str:
    return "/".join(map(str, key))


def _show_row(row: Row) -> str:
    return ", ".join(
        f"{column}={value!r}" if isinstance(value, str) else f"{column}={value}" for column, value in row.items()
    )
