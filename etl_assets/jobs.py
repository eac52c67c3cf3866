"""作业：三个资产的（事件、定时与感应器的运行），与整张表的检查。"""

from __future__ import annotations

from dagster import AssetSelection, define_asset_job

from etl_assets.checks import table_checks

ETL_JOB = "etl"

_CHECKS = AssetSelection.checks(*(spec.key for spec in table_checks.check_specs))

etl_job = define_asset_job(ETL_JOB, selection=AssetSelection.assets("orders", "customers", "leads") - _CHECKS)
checks_job = define_asset_job("table_checks", selection=_CHECKS)
