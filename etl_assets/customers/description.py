"""customers 是怎样的一张表。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.asset_description import ApplicationTable, AssetDescription
from etl_assets.core.tables import SOURCES_OF_FIGURES, TIMESTAMP, TOTAL, figure_columns, timestamp_columns


def define_customers(metadata: sa.MetaData, schema: str) -> sa.Table:
    return sa.Table(
        "customers",
        metadata,
        sa.Column("customer_global_id", sa.Uuid, primary_key=True),
        sa.Column("customer_key", sa.Text, unique=True),
        sa.Column("shop_id", sa.Uuid),
        sa.Column("customer_nickname", sa.Text),
        sa.Column("first_order_at", TIMESTAMP),
        sa.Column("last_order_at", TIMESTAMP),
        sa.Column("order_count", sa.Integer),
        sa.Column("total_amount", TOTAL),
        *figure_columns(),
        *timestamp_columns(),
        schema=schema,
    )


_IDENTITY = ("orders.shop_id", "orders.customer_nickname")
_COUNTED_AT = ("orders.ordered_at", "orders.latest_status")

DESCRIPTION = AssetDescription(
    define_table=define_customers,
    application_table=ApplicationTable(written_as_null=frozenset({"first_order_at", "last_order_at"})),
    dated_by="last_order_at",
    by_customer=True,
    key=("customer_key",),  # 两边的 id 可以不同，那是列的差异，不是行的
    shown=(
        "customer_nickname",
        "order_count",
        "total_amount",
        "sample_count",
        "proof_count",
        "bulk_count",
        "last_order_at",
    ),
    previewed=("customer_nickname", "order_count", "total_amount", "first_order_at", "last_order_at"),
    sources={
        "customer_global_id": _IDENTITY,
        "customer_key": _IDENTITY,
        "shop_id": ("orders.shop_id",),
        "customer_nickname": ("orders.customer_nickname", "orders.ordered_at"),
        "first_order_at": _COUNTED_AT,
        "last_order_at": _COUNTED_AT,
        "order_count": ("orders.order_id", "orders.latest_status"),
        "total_amount": ("orders.amount", "orders.latest_status"),
        **SOURCES_OF_FIGURES,
    },
)
