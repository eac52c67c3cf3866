"""作业：全部资产的（事件、定时与传感器的运行），与整张表的检查。"""

from __future__ import annotations

from dagster import AssetSelection, define_asset_job

from etl_assets.core.asset_folders import asset_folders
from etl_assets.orchestration.check_step import table_checks

ETL_JOB = "etl"

_CHECKS = AssetSelection.checks(*(spec.key for spec in table_checks.check_specs))

etl_job = define_asset_job(ETL_JOB, selection=AssetSelection.assets(*asset_folders()) - _CHECKS)
checks_job = define_asset_job("table_checks", selection=_CHECKS)
