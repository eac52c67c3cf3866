"""作业，与自己动的：每天重做昨天，每晚看整张表，补上台账里早该做完的日子，在来源的页面上写下最近的导入。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from hashlib import md5

import dagster as dg

from etl_assets.core.asset_folders import asset_folders
from etl_assets.core.database_sync import transact
from etl_assets.core.settings import get_settings
from etl_assets.core.text import escape_invisible
from etl_assets.ledger.claims import read_overdue_days
from etl_assets.orchestration.asset_runs import partition_tags
from etl_assets.orchestration.check_step import table_checks
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.reports.reports import newest_imports

ETL_JOB = "etl"
OVERDUE_AFTER = timedelta(minutes=10)
SHOWN_IMPORTS = 20

_CHECKS = dg.AssetSelection.checks(*(spec.key for spec in table_checks.check_specs))

etl_job = dg.define_asset_job(ETL_JOB, selection=dg.AssetSelection.assets(*asset_folders()) - _CHECKS)
checks_job = dg.define_asset_job("table_checks", selection=_CHECKS)
_nightly = partial(
    dg.schedule, execution_timezone=get_settings().timezone, default_status=dg.DefaultScheduleStatus.RUNNING
)


@_nightly(
    job=etl_job,
    cron_schedule="0 3 * * *",
    description="Every night: materialize yesterday again, also without any event.",
)
def yesterday_again(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    zone = get_settings().zone
    day = (context.scheduled_execution_time.astimezone(zone) - timedelta(days=1)).date().isoformat()
    return dg.RunRequest(run_key=day, partition_key=day)


@_nightly(job=checks_job, cron_schedule="30 3 * * *", description="Every night: check the tables as a whole.")
def tables_checked(_context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    return dg.RunRequest()


@dg.sensor(
    job=etl_job,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Days that the ledger has shown as due for ten minutes while nobody works on them: the last resort.",
)
def overdue_days(database: dg.ResourceParam[EtlDatabase]) -> Iterator[dg.RunRequest | dg.SkipReason]:
    overdue = transact(database.engine, read_overdue_days, database.settings.target_schema, OVERDUE_AFTER)
    for days, since in overdue:
        # 同一个要求只催一次；失败的由台账重试或搁置
        yield dg.RunRequest(run_key=f"{days} {since.isoformat()}", tags=partition_tags(days))
    if not overdue:
        yield dg.SkipReason("no day is overdue")


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Notes the newest imports on the page of raw_orders, when there are others than a minute ago. It starts no runs.",
)
def imports_shown(
    context: dg.SensorEvaluationContext, database: dg.ResourceParam[EtlDatabase]
) -> dg.SensorResult | dg.SkipReason:
    """一条观察，不经运行；没有数据版本，所以谁也不因它显得陈旧。"""
    found = transact(database.engine, newest_imports, SHOWN_IMPORTS)
    records = [dg.TableRecord({name: _shown(value) for name, value in row.items()}) for row in found]
    cursor = md5(repr(records).encode(), usedforsecurity=False).hexdigest()
    if not records or cursor == context.cursor:
        return dg.SkipReason("no import since the last look")
    metadata = {"newest_imports": dg.MetadataValue.table(records), "newest_rows": found[0]["rows"] or 0}
    return dg.SensorResult(asset_events=[dg.AssetObservation("raw_orders", metadata=metadata)], cursor=cursor)


def _shown(value: object) -> str | int:
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    return value if isinstance(value, int) else escape_invisible("" if value is None else str(value))
