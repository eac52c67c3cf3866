"""三个资产的作业：事件、定时与感应器的运行都是它。"""

from __future__ import annotations

from dagster import define_asset_job

ETL_JOB = "etl"

etl_job = define_asset_job(ETL_JOB, selection=["orders", "customers", "leads"])
