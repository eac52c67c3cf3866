"""作业，与自己动的：每天重做昨天，每晚看整张表，补上台账里早该做完的日子。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import dagster as dg

from etl_assets.core.asset_folders import asset_folders
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.settings import get_settings
from etl_assets.ledger.claims import read_overdue_days
from etl_assets.orchestration.asset_runs import partition_tags
from etl_assets.orchestration.check_step import table_checks
from etl_assets.orchestration.resources import EtlDatabase

ETL_JOB = "etl"
OVERDUE_AFTER = timedelta(minutes=10)

_CHECKS = dg.AssetSelection.checks(*(spec.key for spec in table_checks.check_specs))

etl_job = dg.define_asset_job(ETL_JOB, selection=dg.AssetSelection.assets(*asset_folders()) - _CHECKS)
checks_job = dg.define_asset_job("table_checks", selection=_CHECKS)
_nightly = partial(dg.schedule, execution_timezone=get_settings().timezone, default_status=dg.DefaultScheduleStatus.RUNNING)


@_nightly(job=etl_job, cron_schedule="0 3 * * *", description="Every night: materialize yesterday again, also without any event.")
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
    with translated_errors(), database.engine.connect() as connection:
        overdue = read_overdue_days(connection, database.settings.target_schema, OVERDUE_AFTER)
    for days, since in overdue:
        # 同一个要求只催一次；失败的由台账重试或搁置
        yield dg.RunRequest(run_key=f"{days} {since.isoformat()}", tags=partition_tags(days))
    if not overdue:
        yield dg.SkipReason("no day is overdue")
