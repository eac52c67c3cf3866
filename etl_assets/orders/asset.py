"""orders 资产。"""

# 资产的模块不写 from __future__ import annotations：注解成了文字，Dagster 认不出 context 的类型，载入就失败
from dagster import AssetExecutionContext, ResourceParam

from etl_assets.core.settings import get_settings
from etl_assets.orchestration.daily_asset import daily_asset, daily_partitions
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.orders.account_checks import CheckedEvents, account_check_specs, materialize_checked
from etl_assets.orders.etl import materialize_orders


@daily_asset(
    deps=["raw_orders", "shop_configs", "order_type_mappings"],
    check_specs=account_check_specs("orders", daily_partitions(get_settings())),
    description="One row per order: the newest valid version of every order with a version on these days.",
)
def orders(context: AssetExecutionContext, database: ResourceParam[EtlDatabase]) -> CheckedEvents:
    yield from materialize_checked(context, database, materialize_orders)
