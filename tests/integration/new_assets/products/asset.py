"""products 资产。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam

from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import daily_asset
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.products.etl import materialize_products


@daily_asset(deps=["orders"], description="Number and amount of a business day's orders, by system order type.")
def products(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(context, database, materialize(context, database, materialize_products))
