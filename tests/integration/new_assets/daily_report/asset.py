"""daily_report 资产。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam

from etl_assets.daily_report.etl import materialize_daily_report
from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import daily_asset
from etl_assets.orchestration.resources import EtlDatabase


@daily_asset(deps=["customers", "products"], description="One row per business day: its customers, its orders and their amount.")
def daily_report(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(materialize(context, database, materialize_daily_report), database)
