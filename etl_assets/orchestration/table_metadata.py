"""网页上一张表的样子：列的结构与注释之外，还有每一列从哪些列来；外围应用写的表是外部资产，血缘才从源头开始。"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from dagster import (
    AssetKey,
    AssetSpec,
    MetadataValue,
    TableColumn,
    TableColumnConstraints,
    TableColumnDep,
    TableColumnLineage,
    TableSchema,
)

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.tables import DIALECT, order_type_mappings, raw_orders, shop_configs, target_tables


def table_metadata(asset: str, schema: str) -> Mapping[str, Any]:
    """资产定义的元数据：表名、列的结构、列的血缘。人手填的列与时间戳没有来源。

    血缘那一条开源的网页从不显示，所以每一列的说明里再写一遍。
    """
    sources_of = descriptions()[asset].sources
    lineage = {column: [_column(source) for source in sources] for column, sources in sources_of.items()}
    says = {column: f"from {', '.join(sources)}" for column, sources in sources_of.items()}
    return {
        **structure_of(target_tables(schema).of_asset[asset], says),
        "dagster/column_lineage": MetadataValue.column_lineage(TableColumnLineage(lineage)),
    }


def structure_of(table: sa.Table, says: Mapping[str, str] = MappingProxyType({})) -> Mapping[str, Any]:
    """一张表的名字与列：上游的只有这些。

    :param says: 列 → 它的说明。
    """
    columns = [
        TableColumn(
            column.name,
            type=column.type.compile(dialect=DIALECT).lower(),
            description=says.get(column.name),
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
    raw_orders: "Append-only platform exports, one row per exported order version; written by the importing application. "
    "The newest imports are under *Events*.",
    shop_configs: "Shop names of the platforms and the shop_id each one stands for.",
    order_type_mappings: "Order types of the platforms and the system order type (SAMPLE, PROOF, BULK) each one stands for.",
}
SOURCES = [
    AssetSpec(table.name, group_name="sources", metadata=structure_of(table), kinds={"postgres"}, description=says)
    for table, says in _SAYS.items()
]
