"""账目的检查：一天一个结果，区间的运行也一样。只有 orders 数得出一天的原始行去了哪里。"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dagster as dg

from etl_assets.orchestration.asset_runs import Etl, materialize, result_of
from etl_assets.orchestration.internals import AssetCheckEvaluationTargetMaterializationData as TargetMaterialization
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.services.accounting import AccountingError, DayAccount
from etl_assets.services.warned_rows import REPEATED, UNMAPPED, DayWarnings

ACCOUNTING, REJECTED_ROWS, WARNED_ROWS = "accounting", "rejected_rows", "warned_rows"
_SAYS = {
    ACCOUNTING: "Raw rows in scope on the day = loaded + superseded + rejected, counted before the data is committed.",
    REJECTED_ROWS: "No raw row of the day was rejected.",
    WARNED_ROWS: "No import has several valid rows of one order on the day, and the type of every order of the day is mapped.",
}
_WARNINGS = {
    REPEATED: "{rows} valid rows lost to a later row of the same order in the same import (one row per item? group them when importing)",
    UNMAPPED: "{rows} orders count as BULK because order_type_mappings does not know their type",
}

CheckedEvents: TypeAlias = Iterator[dg.MaterializeResult[None] | dg.Output[None] | dg.AssetCheckEvaluation]


def account_check_specs(asset: str, partitions: dg.PartitionsDefinition[str]) -> list[dg.AssetCheckSpec]:
    """账不平挡住下游；有拒收的行、可疑的行只是警告。"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # 按分区的检查还是预览；版本已钉住
        return [
            dg.AssetCheckSpec(
                name, asset=asset, blocking=name == ACCOUNTING, partitions_def=partitions, description=says
            )
            for name, says in _SAYS.items()
        ]


def materialize_checked(context: dg.AssetExecutionContext, database: EtlDatabase, etl: Etl) -> CheckedEvents:
    """物化，再报告每天的检查；账不平时什么也没提交，先报告不平的日子，再失败。"""
    try:
        report = materialize(context, database, etl)
    except dg.Failure as failure:
        if isinstance(error := failure.__cause__, AccountingError):
            yield from (_accounting(checked, account) for checked, account in _checked_days(context, error.accounts))
        raise
    # 先交出物化：检查的结果要指着它，没有存下就指不着
    yield result_of(context, database, report)
    for spec in context.assets_def.check_specs:
        # 区间的运行也要一天一个结果，AssetCheckResult 说不出是哪一天；自己造的 Evaluation 不连着输出，输出另交
        yield dg.Output(None, output_name=spec.get_python_identifier())
    for checked, account in _checked_days(context, report.accounts):
        yield _accounting(checked, account)
        yield _rejected_rows(checked, account)
        yield _warned_rows(checked, report.warnings.get(account.day))


@dataclass(frozen=True)
class _Checked:
    """一天的检查怎样报告。"""

    context: dg.AssetExecutionContext
    day: str
    target: TargetMaterialization | None

    def evaluate(
        self, name: str, *, passed: bool, says: str | None, metadata: Mapping[str, Any]
    ) -> dg.AssetCheckEvaluation:
        return dg.AssetCheckEvaluation(
            asset_key=self.context.asset_key,
            check_name=name,
            passed=passed,
            severity=dg.AssetCheckSeverity.ERROR if name == ACCOUNTING else dg.AssetCheckSeverity.WARN,
            blocking=name == ACCOUNTING,
            partition=self.day,
            target_materialization_data=self.target,
            description=says,
            metadata=metadata,
        )


def _accounting(checked: _Checked, account: DayAccount) -> dg.AssetCheckEvaluation:
    counts = {
        "raw": account.raw,
        "loaded": account.loaded,
        "superseded": account.superseded,
        "rejected": account.rejected_count,
        **({"outside_the_share": account.outside} if account.outside else {}),
        "difference": account.difference,
        **({"lost_raw_ids": dg.MetadataValue.json(list(account.lost_examples))} if account.lost_examples else {}),
    }
    return checked.evaluate(ACCOUNTING, passed=account.difference == 0, says=str(account), metadata=counts)


def _rejected_rows(checked: _Checked, account: DayAccount) -> dg.AssetCheckEvaluation:
    """元数据：每条规则的行数，与几个 raw_id。"""
    examples = {rule: list(raw_ids) for rule, raw_ids in account.rejected_examples.items()}
    says = (
        f"{account.rejected_count} rejected; see them with `etl show rejected --day {checked.day}`"
        if account.rejected
        else None
    )
    metadata = {**account.rejected, **({"raw_ids": dg.MetadataValue.json(examples)} if examples else {})}
    return checked.evaluate(REJECTED_ROWS, passed=not account.rejected, says=says, metadata=metadata)


def _warned_rows(checked: _Checked, warned: DayWarnings | None) -> dg.AssetCheckEvaluation:
    """元数据：每种缘由的行数，几个 raw_id，几种没有映射的类型。"""
    if warned is None:
        return checked.evaluate(WARNED_ROWS, passed=True, says=None, metadata={})
    says = "; ".join(_WARNINGS[rule].format(rows=rows) for rule, rows in warned.rows.items())
    metadata = {
        **warned.rows,
        "raw_ids": dg.MetadataValue.json({rule: list(raw_ids) for rule, raw_ids in warned.examples.items()}),
        **({"unmapped_types": dg.MetadataValue.json(dict(warned.types))} if warned.types else {}),
    }
    return checked.evaluate(WARNED_ROWS, passed=False, says=says, metadata=metadata)


def _checked_days(
    context: dg.AssetExecutionContext, accounts: Sequence[DayAccount]
) -> Iterator[tuple[_Checked, DayAccount]]:
    """每一天，连同它最近的物化：检查要指着它，网页才认作这个分区此刻的状态。"""
    days = [account.day.isoformat() for account in accounts]
    wanted = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=days)
    newest_first = context.instance.fetch_materializations(wanted, limit=len(days)).records
    newest = {record.partition_key: record for record in reversed(newest_first)}
    for day, account in zip(days, accounts, strict=True):
        record = newest.get(day)
        target = record and TargetMaterialization(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
        yield _Checked(context, day, target), account
