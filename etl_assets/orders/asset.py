"""orders 资产。"""

from dagster import AssetExecutionContext, ResourceParam, asset

from etl_assets.asset_runs import CheckedEvents, account_check_specs, materialize_checked
from etl_assets.core.settings import get_settings
from etl_assets.orders.etl import materialize_orders
from etl_assets.partitions import FRESH_DAILY, OWNER, RANGE_RUNS, daily_partitions
from etl_assets.resources import EtlDatabase
from etl_assets.table_metadata import table_metadata


@asset(
    partitions_def=daily_partitions(get_settings()),
    check_specs=account_check_specs("orders", daily_partitions(get_settings())),
    backfill_policy=RANGE_RUNS,
    deps=["raw_orders", "shop_configs", "order_type_mappings"],
    group_name="etl",
    owners=[OWNER],
    metadata=table_metadata("orders", get_settings().target_schema),
    freshness_policy=FRESH_DAILY,
    kinds={"polars", "postgres"},
    description="One row per order: the newest valid version of every order with a version on these days.",
)
def orders(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> CheckedEvents:
    yield from materialize_checked(context, database, materialize_orders)
