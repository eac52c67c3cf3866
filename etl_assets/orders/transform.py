"""一行原始记录 → 订单的一个版本：评判、换算。规则见 DOMAIN 第 3 节。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import SYSTEM_ORDER_TYPES, order_type_mappings, shop_configs
from etl_assets.services import raw_rows
from etl_assets.services.customer_keys import customer_key
from etl_assets.services.vectorized_queries import read_frame, release_staging, stage_columns

LONGEST_INDEXED_BYTES = 2_600
"""PostgreSQL 的 B 树一项最多 2,704 字节。"""

_IS_SYSTEM_TYPE = order_type_mappings.c.system_order_type == sa.any_(
    sa.cast(list(SYSTEM_ORDER_TYPES), sa.ARRAY(sa.Text))
)
# 映射到别的也是 BULK；不在这张表里的才是没有映射
_TYPE_MAPPINGS = sa.select(
    sa.literal("type").label("kind"),
    order_type_mappings.c.raw_order_type.label("name"),
    sa.case((_IS_SYSTEM_TYPE, order_type_mappings.c.system_order_type), else_="BULK").label("value"),
)
_SHOPS = sa.select(
    sa.literal("shop").label("kind"),
    shop_configs.c.shop_name.label("name"),
    sa.cast(shop_configs.c.shop_id, sa.Text).label("value"),
).where(shop_configs.c.shop_name.is_not(None))
_REFERENCES = sa.select(_SHOPS.union_all(_TYPE_MAPPINGS).subquery("referenced"))


@dataclass(frozen=True)
class References:
    """评判与换算一行所需的小表。"""

    shops: pl.DataFrame
    type_mappings: pl.DataFrame


@dataclass(frozen=True)
class TransformedRows:
    """versions：一行一条有效的原始记录，orders 的列加 is_unmapped 与 customer_key。rejected：一行一条被拒收的。"""

    versions: pl.DataFrame
    rejected: pl.DataFrame


def read_references(source: sa.Connection) -> References:
    referenced = read_frame(source, _REFERENCES)
    return References(
        shops=referenced.filter(kind="shop").select(shop="name", shop_id="value"),
        type_mappings=referenced.filter(kind="type").select(raw_order_type="name", system_order_type="value"),
    )


def transform(rows: pl.DataFrame, references: References, days: DayRange) -> TransformedRows:
    """评判，并把有效的行换算成 orders 的列。

    输入一行一条原始记录，输出的两帧合起来也是；区间以外被拒收的行不在其中，它们归自己的日子。
    """
    judged = raw_rows.judge(rows, references.shops)
    own_day = pl.col("day").is_between(days.first, days.last)
    rejected = judged.filter(own_day & pl.col("rule").is_not_null()).select("raw_id", "import_id", "day", "rule")
    valid = judged.filter(pl.col("rule").is_null())
    versions = valid.join(references.type_mappings, left_on="order_type", right_on="raw_order_type", how="left").select(
        "shop_id",
        "order_id",
        pl.col("customer_name").alias("customer_nickname"),
        pl.col("order_status").fill_null("unknown").alias("latest_status"),
        pl.col("order_type").alias("raw_order_type"),
        pl.col("system_order_type").fill_null("BULK"),
        pl.col("amount").fill_null(0),
        pl.col("quantity").fill_null(1),
        "ordered_at",
        pl.col("day").alias("order_date"),
        "import_id",
        "raw_id",
        is_unmapped=pl.col("order_type").is_not_null() & pl.col("system_order_type").is_null(),
    )
    return TransformedRows(versions=versions.with_columns(customer_key()), rejected=rejected)


def reject_unindexable(connection: sa.Connection, rows: TransformedRows, days: DayRange) -> TransformedRows:
    """NFKC 能把一个字变成十几个：customer_key 长到 customers 的唯一索引放不下的行，按 text_too_long 拒收。

    放不放得下要看压缩之后的大小，只有服务器知道；这样的行几乎没有，有才去问。
    """
    long = rows.versions.filter(pl.col("customer_key").str.len_bytes() > LONGEST_INDEXED_BYTES)
    if long.is_empty():
        return rows
    columns: list[sa.Column[Any]] = [sa.Column("raw_id", sa.BigInteger), sa.Column("customer_key", sa.Text)]
    staging = stage_columns(connection, long.select("raw_id", "customer_key"), name="long_keys", columns=columns)
    stored_bytes = sa.func.pg_column_size(staging.c.customer_key)
    unindexable = read_frame(connection, sa.select(staging.c.raw_id).where(stored_bytes > LONGEST_INDEXED_BYTES))
    release_staging(connection, staging)
    refused = rows.versions.join(unindexable, on="raw_id", how="semi").filter(
        pl.col("order_date").is_between(days.first, days.last)
    )
    rejected = refused.select(
        "raw_id", "import_id", pl.col("order_date").alias("day"), pl.lit("text_too_long").alias("rule")
    )
    kept = rows.versions.join(unindexable, on="raw_id", how="anti")
    return TransformedRows(versions=kept, rejected=pl.concat([rows.rejected, rejected]))
