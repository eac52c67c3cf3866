"""上游的外部资产：外围应用写的表，列在这里血缘才从源头开始。"""

from __future__ import annotations

from dagster import AssetSpec

from etl_assets.table_metadata import source_metadata

raw_orders = AssetSpec(
    "raw_orders",
    group_name="sources",
    metadata=source_metadata("raw_orders"),
    kinds={"postgres"},
    description="Append-only platform exports, one row per exported order version; written by the importing application.",
)
shop_configs = AssetSpec(
    "shop_configs",
    group_name="sources",
    metadata=source_metadata("shop_configs"),
    kinds={"postgres"},
    description="Shop names of the platforms and the shop_id each one stands for.",
)
order_type_mappings = AssetSpec(
    "order_type_mappings",
    group_name="sources",
    metadata=source_metadata("order_type_mappings"),
    kinds={"postgres"},
    description="Order types of the platforms and the system order type (SAMPLE, PROOF, BULK) each one stands for.",
)
