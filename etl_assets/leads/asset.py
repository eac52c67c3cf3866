"""leads 资产（表 business_leads）。"""

from dagster import AssetExecutionContext, MaterializeResult, ResourceParam

from etl_assets.leads.etl import materialize_leads
from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import daily_asset
from etl_assets.orchestration.resources import EtlDatabase


@daily_asset(
    deps=["customers"],
    description="One row per lead (商机) of the same customers: which orders belong together, and how far the deal has come.",
)
def leads(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
    return result_of(context, database, materialize(context, database, materialize_leads))
