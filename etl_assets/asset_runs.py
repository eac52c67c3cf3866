"""Dagster 的运行与 ETL 函数之间的换算：哪些天、哪个运行、结果怎样写进元数据。"""

from __future__ import annotations

from datetime import date

from dagster import AssetExecutionContext, MaterializeResult

from etl_assets.core.business_day import DayRange
from etl_assets.services.materialization import AssetReport, RunContext

ALLOW_DELETES_TAG = "etl/allow_deletes"


def days_of(context: AssetExecutionContext) -> DayRange:
    """这一步要物化的分区区间。"""
    key_range = context.partition_key_range
    return DayRange(date.fromisoformat(key_range.start), date.fromisoformat(key_range.end))


def run_of(context: AssetExecutionContext) -> RunContext:
    """这一步所属的运行，以及它还做哪些资产。"""
    return RunContext(
        run_id=context.run.run_id,
        assets=frozenset(key.to_user_string() for key in context.job_def.asset_layer.selected_asset_keys),
        allow_deletes=context.run.tags.get(ALLOW_DELETES_TAG) == "true",
    )


def result_of(report: AssetReport) -> MaterializeResult[None]:
    """元数据是整个区间的数字；一天的运行里就是那一天的。"""
    return MaterializeResult(
        metadata={
            "days": len(report.days),
            "rows": report.written.rows,
            "rejected": report.rejected,
            "inserted": report.written.inserted,
            "updated": report.written.updated,
            "deleted": report.written.deleted,
            "duration_seconds": round(report.duration_seconds, 3),
        }
    )
