"""同类做法：一条普通的 dlt 管道，write_disposition 是 merge，写进同一个数据库里自己的 orders。

照 dlt 文档里快的写法：源是一个换算好的视图，由 sql_table 以 pyarrow 后端读出；以 CSV 装入（COPY），不压缩；
upsert 策略，没有变化的行不重写。缺省的 delete-insert 策略每次重写整张表，也更慢。
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import sqlalchemy as sa

from benchmarks.etl.dataset import DAYS
from etl_assets.core.database_sync import normalize_url
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import trimmed

SCHEMA = "dlt_merge"

_CONFIGURATION = {"RUNTIME__DLTHUB_TELEMETRY": "false", "NORMALIZE__DATA_WRITER__DISABLE_COMPRESSION": "true"}
_KEY = ("shop_id", "order_id")


def _trim(column: str) -> str:
    return str(trimmed(sa.literal_column(column)))


# 一行一个订单：最新的有效行。upsert 策略要求键不重复
_MAPPED_ORDERS = f"""
    CREATE OR REPLACE VIEW {SCHEMA}.mapped_orders AS
    WITH trimmed AS MATERIALIZED (
        SELECT
            {_trim("shop")} AS shop,
            {_trim("order_id")} AS order_id,
            {_trim("customer_name")} AS customer_nickname,
            nullif({_trim("order_status")}, '') AS latest_status,
            nullif({_trim("order_type")}, '') AS raw_order_type,
            amount,
            quantity,
            ordered_at,
            CASE WHEN isfinite(ordered_at) THEN (ordered_at AT TIME ZONE 'Asia/Shanghai')::date END AS order_date,
            import_id,
            raw_id
        FROM public.raw_orders
    )
    SELECT DISTINCT ON (shop_id, order_id)
        shop_id,
        order_id,
        customer_nickname,
        coalesce(latest_status, 'unknown') AS latest_status,
        r.raw_order_type,
        CASE WHEN m.system_order_type IN ('SAMPLE', 'PROOF', 'BULK') THEN m.system_order_type ELSE 'BULK' END AS system_order_type,
        coalesce(amount, 0)::numeric(14, 2) AS amount,
        coalesce(quantity, 1) AS quantity,
        ordered_at,
        order_date,
        r.import_id,
        raw_id
    FROM trimmed r
    JOIN public.import_tasks i ON i.import_id = r.import_id AND i.status = 'completed'
    JOIN public.shop_configs s ON s.shop_name = r.shop
    LEFT JOIN public.order_type_mappings m ON m.raw_order_type = r.raw_order_type
    WHERE order_id <> '' AND customer_nickname <> '' AND length(order_id) <= 500 AND length(customer_nickname) <= 500
      AND (amount IS NULL OR amount <> 'NaN') AND coalesce(quantity, 0) >= 0
      AND order_date BETWEEN '{DAYS.first}' AND '{DAYS.last}'
    ORDER BY shop_id, order_id, completed_at DESC NULLS LAST, raw_id DESC"""


def prepare(engine: sa.Engine) -> None:
    """建好源的视图；结果表由 dlt 第一次装入时自己建，已有的清空。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        connection.exec_driver_sql(_MAPPED_ORDERS)
        if sa.inspect(connection).has_table("orders", SCHEMA):
            connection.exec_driver_sql(f"TRUNCATE {SCHEMA}.orders")


def load_orders(engine: sa.Engine, settings: EtlSettings) -> None:
    os.environ.update(_CONFIGURATION)  # dlt 在导入时就读
    # 用到才导入：各方的进程都导入本模块，不该替 dlt 占内存
    import dlt
    from dlt.sources.sql_database import sql_table

    orders = sql_table(
        engine,
        table="mapped_orders",
        schema=SCHEMA,
        backend="pyarrow",
        reflection_level="full_with_precision",
        write_disposition={"disposition": "merge", "strategy": "upsert", "skip_unchanged_rows": True},
        primary_key=_KEY,
    )
    orders.apply_hints(table_name="orders", columns={name: {"nullable": False} for name in _KEY})
    destination = dlt.destinations.postgres(_credentials(settings))
    with tempfile.TemporaryDirectory(prefix="dlt-") as folder:
        pipeline = dlt.pipeline("benchmark", pipelines_dir=folder, destination=destination, dataset_name=SCHEMA)
        pipeline.run(orders, loader_file_format="csv").raise_on_failed_jobs()


def _credentials(settings: EtlSettings) -> dict[str, Any]:
    url = normalize_url(settings.database_url)
    return {
        "drivername": "postgresql",
        "host": url.host,
        "port": url.port,
        "username": url.username,
        "password": url.password,
        "database": url.database,
    }
