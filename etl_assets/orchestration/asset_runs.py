"""Dagster 的运行与 ETL 函数之间的换算：哪些天、哪个运行、结果怎样写进元数据。"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any, TypeAlias, get_args

import sqlalchemy as sa
from dagster import AssetExecutionContext, Failure, MaterializeResult, MetadataValue

from etl_assets.core import metrics
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.business_day import DayRange, partition_range
from etl_assets.core.database_errors import fault_of
from etl_assets.core.errors import EtlError, FailureKind, PermanentError
from etl_assets.core.log import get_logger, process_name
from etl_assets.core.settings import EtlSettings
from etl_assets.core.text import escape_invisible
from etl_assets.core.tracing import span
from etl_assets.ledger.leases import current_lease
from etl_assets.orchestration.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
)
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.orchestration.run_tags import ALLOW_DELETES_TAG, EVENT, TRIGGER_TAG, read_tag
from etl_assets.services.accounting import DayAccount
from etl_assets.services.materialization import AssetReport, RunContext
from etl_assets.services.previews import Preview, Previews, has_previews, read_previews

logger = get_logger(__name__)

WORKER = "worker"
"""物化的元数据：哪台主机的哪个进程做的。"""
_FAILURE_KIND = "failure_kind"
_LONGEST_CELL = 60
_MARKDOWN = re.compile(r"[!-,./:-@\[-`{-~]")  # ASCII 的标点，单独的连字号不算

Etl: TypeAlias = Callable[[sa.Engine, EtlSettings, DayRange, RunContext], AssetReport]


def materialize(context: AssetExecutionContext, database: EtlDatabase, etl: Etl) -> AssetReport:
    """对这一步的日子调用一个 ETL；它的错误在运行页上就是那一句话，不是 Dagster 包着的几层。

    :raises Failure: 说明与种类都是那个 EtlError 的。
    """
    settings, asset = database.settings, context.asset_key.to_user_string()
    try:
        with span(f"materialize {asset}", run_id=context.run.run_id):
            report = etl(database.engine, settings, days_of(context, settings), run_of(context))
    except Exception as error:
        metrics.asset_failed(asset)
        if (fault := fault_of(error)) is None:
            raise
        raise Failure(description=str(fault), metadata={_FAILURE_KIND: fault.kind}) from error
    metrics.asset_made(report.asset, seconds=report.duration_seconds)
    return report


def failure_kind_in(metadata: Mapping[str, MetadataValue]) -> FailureKind | None:
    """`materialize` 写在失败里的种类，工人凭它决定何时再试；不是它写的是 None。"""
    value = metadata[_FAILURE_KIND].value if _FAILURE_KIND in metadata else None
    return next((kind for kind in get_args(FailureKind) if kind == value), None)


def days_of(context: AssetExecutionContext, settings: EtlSettings) -> DayRange:
    """这一步要物化的分区区间。

    :raises PermanentError: 区间出了分区的范围；标签是人写的，Dagster 到做完才核对它。
    """
    key_range = context.partition_key_range
    days = DayRange(date.fromisoformat(key_range.start), date.fromisoformat(key_range.end))
    partitions = partition_range(settings)
    if days.first < partitions.first or days.last > partitions.last:
        raise PermanentError(
            f"{days} is outside the partitions {partitions}, nothing was written: choose days from ETL_PARTITIONS_START to today"
        )
    return days


def partition_tags(days: DayRange) -> dict[str, str]:
    """一个运行的标签里怎样写它的日子。"""
    if len(days) == 1:
        return {PARTITION_NAME_TAG: days.first.isoformat()}
    return {
        ASSET_PARTITION_RANGE_START_TAG: days.first.isoformat(),
        ASSET_PARTITION_RANGE_END_TAG: days.last.isoformat(),
    }


def tagged_days(tags: Mapping[str, str]) -> DayRange | None:
    """一个运行的标签里写着的日子；没有、或不是日子的是 None。"""
    first = tags.get(PARTITION_NAME_TAG) or tags.get(ASSET_PARTITION_RANGE_START_TAG)
    last = tags.get(PARTITION_NAME_TAG) or tags.get(ASSET_PARTITION_RANGE_END_TAG)
    try:
        return DayRange(date.fromisoformat(first), date.fromisoformat(last)) if first and last else None
    except (ValueError, PermanentError):
        return None


def run_of(context: AssetExecutionContext) -> RunContext:
    """这一步所属的运行，以及它还做哪些资产。"""
    return RunContext(
        run_id=context.run.run_id,
        assets=frozenset(key.to_user_string() for key in context.job_def.asset_layer.selected_asset_keys),
        upstreams=frozenset(
            dep.asset_key.to_user_string() for dep in context.assets_def.specs_by_key[context.asset_key].deps
        ),
        allow_deletes=context.run.tags.get(ALLOW_DELETES_TAG) == "true",
        # 没有租约的不经工人，标签也许是从事件的运行抄来的
        is_of_event=read_tag(context.run.tags, TRIGGER_TAG) == EVENT and current_lease.get() is not None,
    )


def result_of(context: AssetExecutionContext, database: EtlDatabase, report: AssetReport) -> MaterializeResult[None]:
    """元数据里每一天的数字是它自己的；整个运行的（算了几行、写了几行、多久），一段日子的合成一句话，不画成曲线。"""
    of_run: dict[str, Any] = {
        "computed": report.written.rows,
        "inserted": report.written.inserted,
        "updated": report.written.updated,
        "deleted": report.written.deleted,
        "duration_seconds": round(report.duration_seconds, 3),
    }
    if len(report.days) > 1:
        seconds = of_run.pop("duration_seconds")
        counts = ", ".join(f"{rows} {what}" for what, rows in {**of_run, "rejected": report.rejected}.items())
        of_run = {"whole_run": f"{report.days}: {counts} in {seconds} s"}
    previews = _previews(report, database)
    accounts = {account.day: account for account in report.accounts}
    for day in report.days:
        own = {"why": f"etl why day {day}", **_of_day(report, accounts.get(day), previews.get(day))}
        context.add_asset_metadata({**own, **of_run}, partition_key=day.isoformat())
    because = {"whole_because": report.whole_because} if report.whole_because else {}
    return MaterializeResult(metadata={"scope": report.scope, **because, WORKER: process_name()})


def _of_day(report: AssetReport, account: DayAccount | None, preview: Preview | None) -> dict[str, Any]:
    """rows 是表里这一天的行数；没有数过的不写，不拿算了几行充数。"""
    found: dict[str, Any] = {}
    if preview is not None:
        found["rows"] = preview.total
    elif account is not None:
        found["rows"] = account.loaded
    if account is not None:
        found |= {"rejected": account.rejected_count}
        found |= {f"rejected/{rule}": rows for rule, rows in sorted(account.rejected.items())}
    elif len(report.days) == 1:
        found["rejected"] = report.rejected
    return found | (_shown(report.asset, preview) if preview is not None else {})


def _previews(report: AssetReport, database: EtlDatabase) -> Previews:
    if report.previews is not None:
        return report.previews
    if not has_previews(report.asset, report.days, report.scope):
        return {}
    try:
        return read_previews(database.engine, database.settings, report.asset, report.days, report.scope)
    except EtlError as error:  # 数据已经提交，样例读不出不是失败
        logger.warning("no preview", asset=report.asset, error=str(error))
        return {}


def _shown(asset: str, preview: Preview) -> dict[str, Any]:
    counted = descriptions()[asset].counted
    kinds = sorted(preview.counts.items())
    counts: dict[str, Any] = {f"{counted[0]}/{name}": rows for name, rows in kinds} if counted else {}
    if not preview.rows:
        return counts
    columns = list(preview.rows[0])
    cells = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in preview.rows)]
    return {**counts, "preview": MetadataValue.md("\n".join("| " + " | ".join(line) + " |" for line in cells))}


def _cell(value: object) -> str:
    """一格 Markdown：买家的文字照字面显示，不成图、链接、HTML，也撑不破表格。

    有标点的写成代码：反斜杠挡不住网址，网页读完 Markdown 再把文字里的网址变成链接。
    """
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if not isinstance(value, str):
        return "" if value is None else str(value)
    text = escape_invisible(" ".join(value.split())[:_LONGEST_CELL])
    if not _MARKDOWN.search(text):
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # 写成 \| 的竖线，前面再有一个反斜杠就又断开一格，后面的不再是代码
    return f"{fence} {text} {fence}".replace("|", r"\x7c")
