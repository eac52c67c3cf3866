"""按业务日分区：各资产共用一个定义，今天就是最后一个分区。"""

from __future__ import annotations

import warnings
from datetime import timedelta

from dagster import BackfillPolicy, BetaWarning, DailyPartitionsDefinition, FreshnessPolicy

from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.claims import MAX_DAYS_PER_RUN

warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=BetaWarning)  # 版本已钉住
RANGE_RUNS = BackfillPolicy.multi_run(max_partitions_per_run=MAX_DAYS_PER_RUN)
"""一段日子一个 Dagster 运行，至多 30 天：回填一个月是一个运行，不是三十个。"""


FRESH_DAILY = FreshnessPolicy.time_window(fail_window=timedelta(hours=48), warn_window=timedelta(hours=28))
"""每晚都重做昨天：过了一天多还没有动静就是警告，两天就是失败。"""

OWNER = "team:etl"


def daily_partitions(settings: EtlSettings) -> DailyPartitionsDefinition:
    """从 ETL_PARTITIONS_START 到今天；end_offset=1 才包括今天。"""
    return DailyPartitionsDefinition(start_date=settings.partitions_start.isoformat(), timezone=settings.timezone, end_offset=1)
