"""网页上一张表的样子：列的结构与注释之外，还有每一列从哪些列来。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from dagster import AssetKey, MetadataValue, TableColumn, TableColumnConstraints, TableColumnDep, TableColumnLineage, TableSchema
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.tables import order_type_mappings, raw_orders, shop_configs, target_tables
from etl_assets.services.figures import FIGURES

_DIALECT: sa.Dialect = pg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy 没给它注解
_ORDER_FACTS = ("orders.system_order_type", "orders.amount", "orders.latest_status")
_FIGURES: Mapping[str, Sequence[str]] = dict.fromkeys(FIGURES, _ORDER_FACTS)
_CUSTOMER = ("orders.shop_id", "orders.customer_nickname")
_DEALING = ("orders.ordered_at", "orders.order_id", "orders.latest_status", "orders.system_order_type")

SOURCES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "orders": {
        "shop_id": ("raw_orders.shop", "shop_configs.shop_name", "shop_configs.shop_id"),
        "order_id": ("raw_orders.order_id",),
        "customer_nickname": ("raw_orders.customer_name",),
        "latest_status": ("raw_orders.order_status",),
        "raw_order_type": ("raw_orders.order_type",),
        "system_order_type": ("raw_orders.order_type", "order_type_mappings.raw_order_type", "order_type_mappings.system_order_type"),
        "amount": ("raw_orders.amount",),
        "quantity": ("raw_orders.quantity",),
        "ordered_at": ("raw_orders.ordered_at",),
        "order_date": ("raw_orders.ordered_at",),
        "import_id": ("raw_orders.import_id",),
        "raw_id": ("raw_orders.raw_id",),
    },
    "customers": {
        "customer_global_id": _CUSTOMER,
        "customer_key": _CUSTOMER,
        "shop_id": ("orders.shop_id",),
        "customer_nickname": ("orders.customer_nickname", "orders.ordered_at"),
        "first_order_at": ("orders.ordered_at", "orders.latest_status"),
        "last_order_at": ("orders.ordered_at", "orders.latest_status"),
        "order_count": ("orders.order_id", "orders.latest_status"),
        "total_amount": ("orders.amount", "orders.latest_status"),
        **_FIGURES,
    },
    "leads": {
        "lead_id": ("customers.customer_key", *_DEALING),
        "customer_global_id": ("customers.customer_global_id",),
        "lead_no": _DEALING,
        "current_stage": (*_DEALING, "orders.order_date"),
        "opened_at": _DEALING,
        "last_order_at": _DEALING,
        "closed_at": _DEALING,
        "closed_by": _DEALING,
        **_FIGURES,
    },
}
"""资产 → 列 → 它由哪些列算出；人手填的列与时间戳没有来源。"""


def table_metadata(asset: str, schema: str) -> Mapping[str, Any]:
    """资产定义的元数据：表名、列的结构、列的血缘。"""
    tables = target_tables(schema)
    table = {"orders": tables.orders, "customers": tables.customers, "leads": tables.leads}[asset]
    return {
        **_describe(table),
        "dagster/column_lineage": MetadataValue.column_lineage(
            TableColumnLineage({column: [_column(source) for source in sources] for column, sources in SOURCES[asset].items()})
        ),
    }


def source_metadata(asset: str) -> Mapping[str, Any]:
    """上游的表：只有结构。"""
    return _describe({"raw_orders": raw_orders, "shop_configs": shop_configs, "order_type_mappings": order_type_mappings}[asset])


def _describe(table: sa.Table) -> Mapping[str, Any]:
    columns = [
        TableColumn(
            column.name,
            type=column.type.compile(dialect=_DIALECT).lower(),
            constraints=TableColumnConstraints(nullable=bool(column.nullable), unique=bool(column.unique)),
        )
        for column in table.columns
    ]
    return {
        "dagster/table_name": table.fullname,
        "dagster/storage_kind": "postgres",
        "dagster/column_schema": MetadataValue.table_schema(TableSchema(columns=columns)),
    }


def _column(source: str) -> TableColumnDep:
    asset, column = source.split(".")
    return TableColumnDep(asset_key=AssetKey(asset), column_name=column)
