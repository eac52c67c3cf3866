"""products 是怎样的一张表。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.asset_description import AssetDescription
from etl_assets.core.tables import TOTAL, timestamp_columns


def define_products(metadata: sa.MetaData, schema: str) -> sa.Table:
    return sa.Table(
        "products",
        metadata,
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("system_order_type", sa.Text, primary_key=True),
        sa.Column("order_count", sa.Integer),
        sa.Column("amount", TOTAL),
        *timestamp_columns(),
        schema=schema,
    )


DESCRIPTION = AssetDescription(
    define_table=define_products,
    dated_by="day",
    shown=("day", "system_order_type", "order_count", "amount"),
    counted=("type", "system_order_type"),
    sources={
        "day": ("orders.order_date",),
        "system_order_type": ("orders.system_order_type",),
        "order_count": ("orders.order_id",),
        "amount": ("orders.amount",),
    },
)
