"""`@daily_asset`：按业务日分区的资产，各资产共有的都在这里。函数的名字就是资产与它的文件夹的名字。"""

from collections.abc import Callable, Sequence
from typing import Any

from dagster import AssetCheckSpec, AssetsDefinition, asset

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.settings import get_settings
from etl_assets.orchestration.graph import BY_CUSTOMER
from etl_assets.orchestration.partitions import FRESH_DAILY, OWNER, RANGE_RUNS, daily_partitions
from etl_assets.orchestration.table_metadata import table_metadata


def daily_asset(
    *, deps: Sequence[str], description: str, check_specs: Sequence[AssetCheckSpec] = ()
) -> Callable[[Callable[..., Any]], AssetsDefinition]:
    """:param deps: 上游；图就是由它们连成的，别处不再写。"""

    def define(materialize: Callable[..., Any]) -> AssetsDefinition:
        name = materialize.__name__
        return asset(
            partitions_def=daily_partitions(get_settings()),
            check_specs=check_specs,
            backfill_policy=RANGE_RUNS,
            deps=deps,
            group_name="etl",
            owners=[OWNER],
            metadata={**table_metadata(name, get_settings().target_schema), BY_CUSTOMER: descriptions()[name].by_customer},
            freshness_policy=FRESH_DAILY,
            kinds={"polars", "postgres"},
            description=description,
        )(materialize)

    return define
