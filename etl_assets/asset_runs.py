"""Dagster 的运行与 ETL 函数之间的换算：哪些天、哪个运行、结果怎样写进元数据与检查。"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import TypeAlias

import sqlalchemy as sa
from dagster import (
    AssetCheckEvaluation,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    AssetRecordsFilter,
    Failure,
    MaterializeResult,
    MetadataValue,
    Output,
    PartitionsDefinition,
    PreviewWarning,
)

from etl_assets.core.business_day import DayRange, partition_range
from etl_assets.core.errors import EtlError, PermanentError
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.text import escape_invisible
from etl_assets.dagster_internals import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG, PARTITION_NAME_TAG
from etl_assets.dagster_internals import AssetCheckEvaluationTargetMaterializationData as TargetMaterialization
from etl_assets.resources import EtlDatabase
from etl_assets.services.accounting import AccountingError, DayAccount
from etl_assets.services.materialization import AssetReport, RunContext
from etl_assets.services.previews import PREVIEWED, read_preview

logger = get_logger(__name__)

ALLOW_DELETES_TAG = "etl/allow_deletes"
COUNTED = {"orders": "type", "leads": "stage"}
_LONGEST_CELL = 60
_MARKDOWN = re.compile(r"[!-,./:-@\[-`{-~]")  # ASCII 的标点，单独的连字号不算
ACCOUNTING, REJECTED_ROWS = "accounting", "rejected_rows"

Etl: TypeAlias = Callable[[sa.Engine, EtlSettings, DayRange, RunContext], AssetReport]
CheckedEvents: TypeAlias = Iterator[MaterializeResult[None] | Output[None] | AssetCheckEvaluation]


def materialize(context: AssetExecutionContext, database: EtlDatabase, etl: Etl) -> AssetReport:
    """对这一步的日子调用一个 ETL；它的错误在运行页上就是那一句话，不是 Dagster 包着的几层。

    :raises Failure: 说明与原因就是那个 EtlError。
    """
    settings = database.settings
    try:
        return etl(database.engine, settings, days_of(context, settings), run_of(context))
    except AccountingError:
        raise
    except EtlError as error:
        raise Failure(description=str(error)) from error


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
    return {ASSET_PARTITION_RANGE_START_TAG: days.first.isoformat(), ASSET_PARTITION_RANGE_END_TAG: days.last.isoformat()}


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
        allow_deletes=context.run.tags.get(ALLOW_DELETES_TAG) == "true",
    )


def result_of(report: AssetReport, database: EtlDatabase) -> MaterializeResult[None]:
    """元数据是整个区间的数字；一天的运行里就是那一天的，另有样例与按类型、阶段的笔数。"""
    by_rule: Counter[str] = Counter()
    for account in report.accounts:
        by_rule.update(account.rejected)
    return MaterializeResult(
        metadata={
            "days": len(report.days),
            "rows": report.written.rows,
            "rejected": report.rejected,
            **{f"rejected/{rule}": rows for rule, rows in sorted(by_rule.items())},
            "inserted": report.written.inserted,
            "updated": report.written.updated,
            "deleted": report.written.deleted,
            "duration_seconds": round(report.duration_seconds, 3),
            **(_preview(report, database) if len(report.days) == 1 and report.asset in PREVIEWED else {}),
        }
    )


def _preview(report: AssetReport, database: EtlDatabase) -> Mapping[str, MetadataValue]:
    try:
        preview = read_preview(database.engine, database.settings, report.asset, report.days.first)
    except EtlError as error:  # 数据已经提交，样例读不出不是失败
        logger.warning("no preview", asset=report.asset, error=str(error))
        return {}
    counts = {f"{COUNTED[report.asset]}/{name}": MetadataValue.int(count) for name, count in sorted(preview.counts.items())}
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


# ---- 账目的检查：一天一个结果，区间的运行也一样 --------------------------------------


def account_check_specs(asset: str, partitions: PartitionsDefinition[str]) -> list[AssetCheckSpec]:
    """账不平挡住下游；有拒收的行只是警告。"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreviewWarning)  # 按分区的检查还是预览；版本已钉住
        return [
            AssetCheckSpec(
                ACCOUNTING,
                asset=asset,
                blocking=True,
                partitions_def=partitions,
                description="Raw rows in scope on the day = loaded + superseded + rejected, counted before the data is committed.",
            ),
            AssetCheckSpec(
                REJECTED_ROWS,
                asset=asset,
                partitions_def=partitions,
                description="No raw row of the day was rejected.",
            ),
        ]


def materialize_checked(context: AssetExecutionContext, database: EtlDatabase, etl: Etl) -> CheckedEvents:
    """物化，再报告每天的检查；账不平时什么也没提交，先报告不平的日子，再失败。"""
    try:
        report = materialize(context, database, etl)
    except AccountingError as error:
        targets = _latest_materializations(context, error.accounts)
        yield from (_accounting(context, account, targets) for account in error.accounts)
        raise Failure(description=str(error)) from error
    yield result_of(report, database)
    for spec in context.assets_def.check_specs:
        yield Output(None, output_name=spec.get_python_identifier())
    targets = _latest_materializations(context, report.accounts)
    for account in report.accounts:
        yield _accounting(context, account, targets)
        yield _rejected_rows(context, account, targets)


def _accounting(context: AssetExecutionContext, account: DayAccount, targets: Mapping[str, TargetMaterialization]) -> AssetCheckEvaluation:
    return AssetCheckEvaluation(
        asset_key=context.asset_key,
        check_name=ACCOUNTING,
        passed=account.difference == 0,
        blocking=True,
        partition=account.day.isoformat(),
        target_materialization_data=targets.get(account.day.isoformat()),
        description=str(account),
        metadata={
            "raw": account.raw,
            "loaded": account.loaded,
            "superseded": account.superseded,
            "rejected": account.rejected_count,
            **({"outside_the_share": account.outside} if account.outside else {}),
            "difference": account.difference,
            **({"lost_raw_ids": MetadataValue.json(list(account.lost_examples))} if account.lost_examples else {}),
        },
    )


def _rejected_rows(
    context: AssetExecutionContext, account: DayAccount, targets: Mapping[str, TargetMaterialization]
) -> AssetCheckEvaluation:
    """元数据：每条规则的行数，与几个 raw_id。"""
    day = account.day.isoformat()
    examples = {rule: list(raw_ids) for rule, raw_ids in account.rejected_examples.items()}
    return AssetCheckEvaluation(
        asset_key=context.asset_key,
        check_name=REJECTED_ROWS,
        passed=not account.rejected,
        severity=AssetCheckSeverity.WARN,
        blocking=False,
        partition=day,
        target_materialization_data=targets.get(day),
        description=f"{account.rejected_count} rejected; see them with `etl show rejected --day {day}`" if account.rejected else None,
        metadata={**account.rejected, **({"raw_ids": MetadataValue.json(examples)} if examples else {})},
    )


def _latest_materializations(context: AssetExecutionContext, accounts: Sequence[DayAccount]) -> Mapping[str, TargetMaterialization]:
    """分区 → 它最近的物化：检查要指着它，网页才认作这个分区此刻的状态。"""
    keys = [account.day.isoformat() for account in accounts]
    wanted = AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=keys)
    newest_first = context.instance.fetch_materializations(wanted, limit=len(keys)).records
    return {
        record.partition_key or "": TargetMaterialization(storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp)
        for record in reversed(newest_first)
    }
