"""哪些行 ETL 会拒收、按哪条规则：由 ETL 自己的评判来说。不认识的店，导入时另外说。"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from etl_assets.core.business_day import partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.core.text import MAX_TEXT_LENGTH
from etl_assets.services.raw_rows import judge

_KINDS = pl.Schema(
    {
        **dict.fromkeys(("order_id", "shop", "customer_name", "order_type", "order_status"), pl.String()),
        "quantity": pl.Int32(),
        "ordered_at": pl.Datetime("us", "UTC"),
    }
)
_NEEDED = ("order_id", "shop", "customer_name")


def count_rejected(orders: pl.DataFrame, texts: pl.DataFrame, settings: EtlSettings | None = None) -> Mapping[str, int]:
    """一块里每条规则拒收几行；texts 是修剪过的文字。没有可疑的行（几乎总是这样）就不必评判。

    :param settings: 有哪些分区；None 就不看日子。
    """
    outside = _outside_partitions(settings) if settings and "ordered_at" in orders.columns else pl.lit(value=False)
    if not _is_suspect(orders, texts) and not orders.select(outside.any()).item():
        return {}
    rows = orders.with_columns(
        pl.lit(None, kind).alias(name) for name, kind in _KINDS.items() if name not in orders.columns
    )
    shop = pl.col("shop").str.strip_chars()
    known = rows.select(shop, shop.alias("shop_id")).drop_nulls().unique()
    missing = pl.when(pl.col("ordered_at").is_null()).then(pl.lit("missing_ordered_at"))
    time_rule = missing.when(outside).then(pl.lit("outside_partitions"))
    judged = judge(rows.with_columns(time_rule=time_rule, amount_rule=pl.lit(None, pl.String)), known)
    return dict(judged["rule"].drop_nulls().value_counts(sort=True).iter_rows())


def _outside_partitions(settings: EtlSettings) -> pl.Expr:
    days = partition_range(settings)
    day = pl.col("ordered_at").dt.convert_time_zone(settings.timezone).dt.date()
    return (day < days.first) | (day > days.last)


def _is_suspect(orders: pl.DataFrame, texts: pl.DataFrame) -> bool:
    if not orders.height or not {*_NEEDED, "ordered_at"} <= {*orders.columns}:
        return True
    long = [pl.col(name).str.len_bytes().max() > MAX_TEXT_LENGTH for name in ("order_id", "customer_name")]
    blank = [pl.col(name).is_null().any() | (pl.col(name) == "").any() for name in _NEEDED]
    negative = (orders["quantity"] < 0).any() if "quantity" in orders.columns else False
    return negative or orders["ordered_at"].has_nulls() or bool(texts.select(pl.any_horizontal(*long, *blank)).item())
