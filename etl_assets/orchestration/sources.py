"""上游的外部资产：外围应用写的表，列在这里血缘才从源头开始。"""

from __future__ import annotations

from dagster import AssetSpec

from etl_assets.core.tables import order_type_mappings, raw_orders, shop_configs
from etl_assets.orchestration.table_metadata import structure_of

_SAYS = {
    raw_orders: "Append-only platform exports, one row per exported order version; written by the importing application.",
    shop_configs: "Shop names of the platforms and the shop_id each one stands for.",
    order_type_mappings: "Order types of the platforms and the system order type (SAMPLE, PROOF, BULK) each one stands for.",
}
SOURCES = [
    AssetSpec(table.name, group_name="sources", metadata=structure_of(table), kinds={"postgres"}, description=says)
    for table, says in _SAYS.items()
]
