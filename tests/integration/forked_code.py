"""比三个真的资产多两个：products 只要 orders，daily_report 要 customers 与 products；older 只有那三个。"""

from dagster import (
    AssetExecutionContext,
    AssetsDefinition,
    AssetSpec,
    Definitions,
    MaterializeResult,
    ResourceParam,
    asset,
    define_asset_job,
    in_process_executor,
)

from etl_assets.core.settings import get_settings
from etl_assets.definitions import defs as current
from etl_assets.orchestration.asset_runs import materialize, result_of
from etl_assets.orchestration.daily_asset import RANGE_RUNS, daily_partitions
from etl_assets.orchestration.resources import EtlDatabase
from tests.integration.engine import extra_assets
from tests.the_three import graph


def extra(name: str, *upstreams: str) -> AssetsDefinition:
    @asset(name=name, deps=list(upstreams), partitions_def=daily_partitions(get_settings()), backfill_policy=RANGE_RUNS)
    def made(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> MaterializeResult[None]:
        return result_of(context, database, materialize(context, database, extra_assets.materialize_extra(name)))

    return made


def code(assets: list[AssetsDefinition | AssetSpec]) -> Definitions:
    return Definitions(
        assets=assets,
        jobs=[define_asset_job("etl", selection=[one for one in assets if isinstance(one, AssetsDefinition)])],
        resources=current.resources,
        executor=in_process_executor,
    )


_THE_THREE = [
    one for one in current.assets or () if isinstance(one, AssetSpec) or one.key.to_user_string() in graph.names
]
older = code(_THE_THREE)
defs = code([*_THE_THREE, extra("products", "orders"), extra("daily_report", "customers", "products")])
