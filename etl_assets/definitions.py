"""Dagster 代码位置的入口：只做合并。"""

from __future__ import annotations

from dagster import Definitions, in_process_executor

from etl_assets import sources
from etl_assets.automation import overdue_days, tables_checked, yesterday_again
from etl_assets.checks import table_checks
from etl_assets.customers.asset import customers
from etl_assets.jobs import checks_job, etl_job
from etl_assets.leads.asset import leads
from etl_assets.orders.asset import orders
from etl_assets.resources import EtlDatabase

defs = Definitions(
    assets=[sources.raw_orders, sources.shop_configs, sources.order_type_mappings, orders, customers, leads],
    asset_checks=[table_checks],
    jobs=[etl_job, checks_job],
    schedules=[yesterday_again, tables_checked],
    sensors=[overdue_days],
    resources={"database": EtlDatabase()},
    executor=in_process_executor,
)
