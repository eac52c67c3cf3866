"""把一列值写成文件再读回来：数与时刻的写法那几个测试共用。"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.conventions import GivenConventions
from bridge.imports.orders.mapping import map_columns
from bridge.imports.reading import Reading
from bridge.imports.rules.errors import ColumnReading, ImportFileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import FileFormat, Profile

ROW = {
    "order_id": "A1",
    "shop": "店",
    "customer_name": "张三",
    "order_status": "已完成",
    "amount": "1",
    "quantity": "1",
    "ordered_at": "2024-01-05",
}
PLAIN = GivenConventions()


def write_column(folder: Path, column: str, values: Sequence[str]) -> Path:
    path = folder / "orders.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROW)
        writer.writerows(
            list({**ROW, "order_id": f"A{number}", column: value}.values()) for number, value in enumerate(values, 1)
        )
    return path


def read_file(
    path: Path,
    *,
    given: GivenConventions = PLAIN,
    profile: Profile | None = None,
    time_zone: str = "Asia/Shanghai",
    skip_bad_rows: bool = False,
) -> tuple[pl.DataFrame, list[ColumnReading]]:
    """
    :raises ImportFileError: 文件不能导入，一个坏行就够。
    """
    source = open_source(path, profile.file if profile else FileFormat())
    builder = OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), time_zone, given)
    with BadRows(path, write=False) as bad_rows:
        orders = list(Reading(builder, bad_rows, skip_bad_rows=skip_bad_rows, on_progress=None).orders())
    return pl.concat(orders), builder.conventions.describe()


def read_column(folder: Path, column: str, values: Sequence[str], **options: Any) -> list[Any]:
    return read_file(write_column(folder, column, values), **options)[0][column].to_list()


def refusal(folder: Path, column: str, values: Sequence[str], **options: Any) -> str | None:
    """拒绝的那句话；读得出就是 None。"""
    try:
        read_column(folder, column, values, **options)
    except ImportFileError as error:
        return str(error)
    return None
