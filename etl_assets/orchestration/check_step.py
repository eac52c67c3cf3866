"""表的检查：网页上点的运行连它们一起做，只看那些天；每晚看整张表。事件的运行不做，它们自己的账已经挡住错的数据。"""

# 这里不写 from __future__ import annotations，缘由同 asset.py：Dagster 要看 context 真正的类型
from collections.abc import Iterator

import dagster as dg

from etl_assets.core.asset_folders import checks_of, descriptions
from etl_assets.core.database_sync import transact
from etl_assets.ledger.alerts import note_checks
from etl_assets.orchestration.asset_runs import tagged_days
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.services.table_checks import count_violations

_CHECKS = [(asset, name, check) for asset in descriptions() for name, check in checks_of(asset).items()]
_SPECS = [dg.AssetCheckSpec(name, asset=asset, description=check.says) for asset, name, check in _CHECKS]


@dg.multi_asset_check(name="check_tables", specs=_SPECS, can_subset=True)
def table_checks(
    context: dg.AssetCheckExecutionContext, database: dg.ResourceParam[EtlDatabase]
) -> Iterator[dg.AssetCheckResult]:
    """一步做完所选的：每多一步，人就多等几十毫秒。"""
    days = tagged_days(context.run.tags)
    wanted = {(key.asset_key.to_user_string(), key.name) for key in context.selected_asset_check_keys}
    for asset in descriptions():
        names = {name for of_asset, name in wanted if of_asset == asset}
        found = count_violations(database.engine, database.settings, asset, days) if names else {}
        if found and days is None:
            transact(database.engine, note_checks, database.settings.target_schema, asset, found)
        for name in sorted(names):
            yield dg.AssetCheckResult(
                asset_key=asset,
                check_name=name,
                passed=found[name] == 0,
                severity=dg.AssetCheckSeverity.ERROR,
                metadata={"violations": found[name], "looked_at": str(days or "the whole table")},
            )
