"""把几行写成文件再读回来：订单与商品行的那几个测试共用。"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.orders.statuses import Statuses
from bridge.imports.reading import ImportReport, Reading
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import FileFormat, LineRule, Profile

HEADER = ("order_id", "customer_name", "order_status", "amount", "quantity", "ordered_at", "item")
STATUSES = Statuses(("closed", "已退款"), ("done",))
LINE = {
    "order_id": "A",
    "customer_name": "张",
    "order_status": "done",
    "amount": "5",
    "quantity": "1",
    "ordered_at": "2026-03-02",
}


def line(order_id: str, item: str = "", **values: str) -> tuple[str, ...]:
    found = {**LINE, "item": item, **values, "order_id": order_id}
    return tuple(found[name] for name in HEADER)


def write(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> Path:
    path = folder / "orders.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(
    path: Path,
    lines: LineRule | None = None,
    profile: Profile | None = None,
    *,
    skip_bad_rows: bool = False,
    shop: str | None = "店",
) -> tuple[pl.DataFrame, ImportReport]:
    """
    :raises ImportFileError: 文件不能导入。
    """
    source = open_source(path, profile.file if profile else FileFormat())
    mapping = map_columns(source, profile, overrides={}, shop=shop)
    builder = OrderBuilder(source, mapping, "UTC", lines=lines or mapping.profile.file.lines, statuses=STATUSES)
    with BadRows(path, write=False) as bad_rows:
        reading = Reading(builder, bad_rows, skip_bad_rows=skip_bad_rows, on_progress=None)
        orders = list(reading.orders())
    return pl.concat(orders), reading.report


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ImportFileError) as caught:
        read(path, **options)
    return str(caught.value)
