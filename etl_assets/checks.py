"""表的检查：网页上点的运行连它们一起做，只看那些天；每晚看整张表。事件的运行不做，它们自己的账已经挡住错的数据。"""

from collections.abc import Iterator

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetCheckSpec,
    ResourceParam,
    multi_asset_check,
)

from etl_assets.asset_runs import tagged_days
from etl_assets.resources import EtlDatabase
from etl_assets.services.table_checks import CHECKS, count_violations


def _checks_of(asset: str) -> AssetChecksDefinition:
    specs = [AssetCheckSpec(name, asset=asset, description=says) for name, says in CHECKS[asset].items()]

    @multi_asset_check(name=f"{asset}_table", specs=specs)
    def check(context: AssetCheckExecutionContext, database: ResourceParam[EtlDatabase]) -> Iterator[AssetCheckResult]:
        days = tagged_days(context.run.tags)
        for name, violations in count_violations(database.engine, database.settings, asset, days).items():
            yield AssetCheckResult(
                asset_key=asset,
                check_name=name,
                passed=violations == 0,
                severity=AssetCheckSeverity.ERROR,
                metadata={"violations": violations, "looked_at": str(days or "the whole table")},
            )

    return check


table_checks = [_checks_of(asset) for asset in CHECKS]
