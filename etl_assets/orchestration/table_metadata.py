"""网页上一张表的样子：列的结构与注释之外，还有每一列从哪些列来；外围应用写的表是外部资产，血缘才从源头开始。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from dagster import AssetKey, AssetSpec, MetadataValue, TableColumn, TableColumnConstraints, TableColumnDep, TableColumnLineage, TableSchema

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.tables import DIALECT, order_type_mappings, raw_orders, shop_configs, target_tables


def table_metadata(asset: str, schema: str) -> Mapping[str, Any]:
    """资产定义的元数据：表名、列的结构、列的血缘。人手填的列与时间戳没有来源。"""
    lineage = {column: [_column(source) for source in sources] for column, sources in descriptions()[asset].sources.items()}
    return {
        **structure_of(target_tables(schema).of_asset[asset]),
        "dagster/column_lineage": MetadataValue.column_lineage(TableColumnLineage(lineage)),
    }


def structure_of(table: sa.Table) -> Mapping[str, Any]:
    """一张表的名字与列：上游的只有这些。"""
    columns = [
        TableColumn(
            column.name,
            type=column.type.compile(dialect=DIALECT).lower(),
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


_SAYS = {
    raw_orders: "Append-only platform exports, one row per exported order version; written by the importing application.",
    shop_configs: "Shop names of the platforms and the shop_id each one stands for.",
    order_type_mappings: "Order types of the platforms and the system order type (SAMPLE, PROOF, BULK) each one stands for.",
}
SOURCES = [
    AssetSpec(table.name, group_name="sources", metadata=structure_of(table), kinds={"postgres"}, description=says)
    for table, says in _SAYS.items()
]
