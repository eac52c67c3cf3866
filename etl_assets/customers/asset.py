"""customers 资产。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam

from etl_assets.customers.etl import materialize_customers
from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import daily_asset
from etl_assets.orchestration.resources import EtlDatabase


@daily_asset(
    deps=["orders"], description="One row per customer with an order on these days, over the customer's whole history."
)
def customers(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(context, database, materialize(context, database, materialize_customers))
