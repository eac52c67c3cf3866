"""`@daily_asset`：按业务日分区的资产，各资产共有的都在这里。函数的名字就是资产与它的文件夹的名字。"""

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from dagster import (
    AssetCheckSpec,
    AssetsDefinition,
    BackfillPolicy,
    BetaWarning,
    DailyPartitionsDefinition,
    FreshnessPolicy,
    asset,
)

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.ledger.claims import MAX_DAYS_PER_RUN
from etl_assets.orchestration.graph import BY_CUSTOMER
from etl_assets.orchestration.table_metadata import table_metadata

warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=BetaWarning)  # 版本已钉住
RANGE_RUNS = BackfillPolicy.multi_run(max_partitions_per_run=MAX_DAYS_PER_RUN)
"""一段日子一个 Dagster 运行，至多 30 天：回填一个月是一个运行，不是三十个。"""
FRESH_DAILY = FreshnessPolicy.time_window(fail_window=timedelta(hours=48), warn_window=timedelta(hours=28))
"""每晚都重做昨天：过了一天多还没有动静就是警告，两天就是失败。"""
OWNER = "team:etl"


def daily_partitions(settings: EtlSettings) -> DailyPartitionsDefinition:
    """从 ETL_PARTITIONS_START 到今天，各资产共用；end_offset=1 才包括今天。网页的代码服务器从有数据的那一年起。"""
    first = settings.shown_since or settings.partitions_start
    return DailyPartitionsDefinition(start_date=first.isoformat(), timezone=settings.timezone, end_offset=1)


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
            metadata={
                **table_metadata(name, get_settings().target_schema),
                BY_CUSTOMER: descriptions()[name].by_customer,
            },
            freshness_policy=FRESH_DAILY,
            kinds={"polars", "postgres"},
            description=description,
        )(materialize)

    return define
