"""Dagster 代码位置的入口：只做合并。"""

from __future__ import annotations

from dagster import Definitions, in_process_executor

from etl_assets import sources
from etl_assets.automation import overdue_days, yesterday_again
from etl_assets.customers.asset import customers
from etl_assets.jobs import etl_job
from etl_assets.leads.asset import leads
from etl_assets.orders.asset import orders
from etl_assets.resources import EtlDatabase

defs = Definitions(
    assets=[sources.raw_orders, sources.shop_configs, sources.order_type_mappings, orders, customers, leads],
    jobs=[etl_job],
    schedules=[yesterday_again],
    sensors=[overdue_days],
    resources={"database": EtlDatabase()},
    executor=in_process_executor,
)
