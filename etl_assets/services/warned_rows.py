"""警告而不拒收的行：一次导入里一个订单有几行，类型没有映射。数自运行已经读到的，不再查一遍（DOMAIN 第 3 节）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

import polars as pl

from etl_assets.core.business_day import DayRange

REPEATED, UNMAPPED = "repeated_in_import", "unmapped_type"
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class DayWarnings:
    """一天的警告；行记在它自己的业务日上。

    :param rows: 缘由 → 行数。repeated_in_import 是输给同一次导入里同一订单更靠后一行的；unmapped_type 是装入的。
    :param examples: 缘由 → 最小的几个 raw_id。
    :param types: 没有映射的类型 → 行数，多的在前，只有几种。
    """

    rows: Mapping[str, int]
    examples: Mapping[str, Sequence[int]]
    types: Mapping[str, int] = field(default_factory=dict)


def warn_by_day(days: DayRange, superseded: pl.DataFrame, unmapped: pl.DataFrame) -> Mapping[date, DayWarnings]:
    """这些天里有警告的 → 它的警告。

    :param superseded: 一行一个输掉的版本：raw_id、order_date、is_repeated。
    :param unmapped: 一行一个类型没有映射的赢家：raw_id、order_date、raw_order_type。
    """
    on_days = pl.col("order_date").is_between(days.first, days.last)
    repeated, unmapped = superseded.filter("is_repeated", on_days), unmapped.filter(on_days)
    if repeated.is_empty() and unmapped.is_empty():  # 几乎总是这样
        return {}
    warned = pl.concat(
        [
            repeated.select("raw_id", "order_date", rule=pl.lit(REPEATED)),
            unmapped.select("raw_id", "order_date", rule=pl.lit(UNMAPPED)),
        ]
    )
    smallest = pl.col("raw_id").sort().head(_EXAMPLES)
    counts = warned.group_by("order_date", "rule").agg(pl.len().alias("rows"), smallest.alias("examples")).sort("rule")
    types = (
        unmapped.group_by("order_date", "raw_order_type")
        .agg(pl.len().alias("rows"))
        .sort("rows", "raw_order_type", descending=[True, False])
    )
    return {
        day: _day_warnings(counts.filter(order_date=day), types.filter(order_date=day))
        for day in counts["order_date"].unique()
    }


def _day_warnings(counts: pl.DataFrame, types: pl.DataFrame) -> DayWarnings:
    return DayWarnings(
        rows=dict(counts.select("rule", "rows").iter_rows()),
        examples=dict(counts.select("rule", "examples").iter_rows()),
        types=dict(types.head(_EXAMPLES).select("raw_order_type", "rows").iter_rows()),
    )
