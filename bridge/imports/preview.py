"""试运行让人先看的：头几行存成什么样，各列从哪里来。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from bridge.imports.files.cells import Source
from bridge.imports.orders.mapping import ColumnMapping, MappedColumn
from bridge.imports.rules.profile import ROW_NUMBER
from etl_assets.core.settings import EtlSettings

SHOWN_ROWS = 5


@dataclass
class Preview:
    """一个文件的预览，边读边记。

    :param unused_columns: 文件里没有用到的列。
    :ivar rows: 头几行，raw_orders 的列，时刻在业务时区。
    """

    columns: Sequence[MappedColumn]
    unused_columns: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)


class PreviewBuilder:
    """看着一块块订单过去。"""

    def __init__(self, mapping: ColumnMapping, source: Source, settings: EtlSettings) -> None:
        self.preview = Preview(
            mapping.describe(), [name for name in source.columns if name not in mapping.used | source.added]
        )
        self._time_zone = settings.timezone

    def add(self, orders: pl.DataFrame) -> None:
        missing = SHOWN_ROWS - len(self.preview.rows)
        if missing > 0:
            local = pl.col(pl.Datetime("us", "UTC")).dt.convert_time_zone(self._time_zone)
            self.preview.rows += orders.head(missing).drop(ROW_NUMBER).with_columns(local).to_dicts()
