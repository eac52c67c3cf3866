"""customers 资产。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam, asset

from etl_assets.asset_runs import materialize, result_of
from etl_assets.core.settings import get_settings
from etl_assets.customers.etl import materialize_customers
from etl_assets.partitions import FRESH_DAILY, OWNER, RANGE_RUNS, daily_partitions
from etl_assets.resources import EtlDatabase
from etl_assets.table_metadata import table_metadata


@asset(
    partitions_def=daily_partitions(get_settings()),
    backfill_policy=RANGE_RUNS,
    deps=["orders"],
    group_name="etl",
    owners=[OWNER],
    metadata=table_metadata("customers", get_settings().target_schema),
    freshness_policy=FRESH_DAILY,
    kinds={"polars", "postgres"},
    description="One row per customer with an order on these days, over the customer's whole history.",
)
def customers(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(materialize(context, database, materialize_customers), database)
