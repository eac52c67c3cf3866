"""本项目的三个 ETL，像一个运行那样依次调用。"""

from __future__ import annotations

from uuid import uuid4

import sqlalchemy as sa

from benchmarks.etl.dataset import DAYS
from etl_assets.core.etl_tables import ledger, order_index, outbox, rejected_rows, stale_customers
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.customers.etl import materialize_customers
from etl_assets.definitions import graph  # 工人的进程里也有 Dagster，内存要算上它
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.materialization import RunContext


def prepare(engine: sa.Engine, settings: EtlSettings) -> None:
    """清空结果与 ETL 自己的表。"""
    targets = target_tables(settings.target_schema)
    tables = (
        targets.orders,
        targets.customers,
        targets.leads,
        order_index,
        stale_customers,
        rejected_rows,
        outbox,
        ledger,
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(table.fullname for table in tables)}")


def load_orders(engine: sa.Engine, settings: EtlSettings) -> None:
    materialize_orders(engine, settings, DAYS, _run("orders"))


def load_customers(engine: sa.Engine, settings: EtlSettings) -> None:
    materialize_customers(engine, settings, DAYS, _run("customers"))


def load_leads(engine: sa.Engine, settings: EtlSettings) -> None:
    materialize_leads(engine, settings, DAYS, _run("leads"))


def _run(asset: str) -> RunContext:
    return RunContext(run_id=str(uuid4()), assets=frozenset(graph.names), upstreams=graph.upstreams(asset))
