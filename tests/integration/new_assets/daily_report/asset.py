"""daily_report 资产。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam

from etl_assets.daily_report.etl import materialize_daily_report
from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import daily_asset
from etl_assets.orchestration.resources import EtlDatabase


@daily_asset(deps=["customers", "products"], description="A business day's customers, its orders and their amount.")
def daily_report(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(context, database, materialize(context, database, materialize_daily_report))
