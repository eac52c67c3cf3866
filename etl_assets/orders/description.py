"""orders 是怎样的一张表。"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from etl_assets.core.asset_description import ApplicationTable, AssetDescription, Lookup, probe
from etl_assets.core.tables import AMOUNT, TIMESTAMP, timestamp_columns
from etl_assets.core.text import MAX_TEXT_LENGTH

if TYPE_CHECKING:
    from etl_assets.core.business_day import DayRange


def define_orders(metadata: sa.MetaData, schema: str) -> sa.Table:
    return sa.Table(
        "orders",
        metadata,
        sa.Column("shop_id", sa.Uuid, primary_key=True),
        sa.Column("order_id", sa.Text, primary_key=True),
        sa.Column("customer_nickname", sa.Text),
        sa.Column("latest_status", sa.Text),
        sa.Column("raw_order_type", sa.Text),
        sa.Column("system_order_type", sa.Text),
        sa.Column("amount", AMOUNT),
        sa.Column("quantity", sa.Integer),
        sa.Column("ordered_at", TIMESTAMP),
        sa.Column("order_date", sa.Date, index=True),
        sa.Column("import_id", sa.Uuid),
        sa.Column("raw_id", sa.BigInteger),
        *timestamp_columns(),
        schema=schema,
    )


def lookups(orders: sa.Table, partitions: DayRange) -> list[Lookup]:
    day = orders.c.order_date
    return [Lookup(orders, "order_date", "order_date", {"order_date"}, [probe(partitions.includes(day), day)])]


DESCRIPTION = AssetDescription(
    define_table=define_orders,
    application_table=ApplicationTable(
        written_as_null=frozenset({"raw_order_type"}),
        longest_text={
            "order_id": MAX_TEXT_LENGTH,
            "customer_nickname": MAX_TEXT_LENGTH,
            "system_order_type": len("SAMPLE"),
        },
        lookups=lookups,
    ),
    dated_by="order_date",
    then_by="ordered_at",
    shown=("order_date", "order_id", "customer_nickname", "latest_status", "system_order_type", "amount", "quantity"),
    previewed=("order_id", "customer_nickname", "latest_status", "system_order_type", "amount", "ordered_at"),
    counted=("type", "system_order_type"),
    sources={
        "shop_id": ("raw_orders.shop", "shop_configs.shop_name", "shop_configs.shop_id"),
        "order_id": ("raw_orders.order_id",),
        "customer_nickname": ("raw_orders.customer_name",),
        "latest_status": ("raw_orders.order_status",),
        "raw_order_type": ("raw_orders.order_type",),
        "system_order_type": (
            "raw_orders.order_type",
            "order_type_mappings.raw_order_type",
            "order_type_mappings.system_order_type",
        ),
        "amount": ("raw_orders.amount",),
        "quantity": ("raw_orders.quantity",),
        "ordered_at": ("raw_orders.ordered_at",),
        "order_date": ("raw_orders.ordered_at",),
        "import_id": ("raw_orders.import_id",),
        "raw_id": ("raw_orders.raw_id",),
    },
)
