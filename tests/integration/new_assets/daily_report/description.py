"""daily_report 是怎样的一张表。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.asset_description import AssetDescription
from etl_assets.core.tables import TOTAL, timestamp_columns


def define_daily_report(metadata: sa.MetaData, schema: str) -> sa.Table:
    return sa.Table(
        "daily_report",
        metadata,
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("customer_count", sa.Integer),
        sa.Column("order_count", sa.Integer),
        sa.Column("amount", TOTAL),
        *timestamp_columns(),
        schema=schema,
    )


DESCRIPTION = AssetDescription(
    define_table=define_daily_report,
    dated_by="day",
    shown=("day", "customer_count", "order_count", "amount"),
    sources={
        "day": ("products.day",),
        "customer_count": ("customers.customer_key", "orders.order_date"),
        "order_count": ("products.order_count",),
        "amount": ("products.amount",),
    },
)
