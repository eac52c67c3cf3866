"""下限：三张表各由一条库内的 INSERT … SELECT … ON CONFLICT 写成，数据不出服务器，写进自己的 schema。

换算与产品相同；只是库里没有 SHA-1，客户与商机的 id 用 md5 代替 UUIDv5，也没有别人碰过的商机要顾及。
客户与商机读产品写下的 orders 与订单索引，与产品自己的一样。
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from benchmarks.etl.dataset import DAYS
from etl_assets.core.settings import EtlSettings
from etl_assets.core.text import WHITE_SPACE

SCHEMA = "floor"

_WHITE = "E'" + "".join(f"\\u{ord(character):04X}" for character in WHITE_SPACE) + "'"

_ORDER_COLUMNS = (
    *("shop_id", "order_id", "customer_nickname", "latest_status", "raw_order_type", "system_order_type"),
    *("amount", "quantity", "ordered_at", "order_date", "import_id", "raw_id"),
)
_FIGURES = tuple(f"{kind}_{figure}" for figure in ("count", "amount") for kind in ("sample", "proof", "bulk"))
_CUSTOMER_COLUMNS = (
    *("customer_global_id", "customer_key", "shop_id", "customer_nickname", "first_order_at", "last_order_at"),
    *("order_count", "total_amount", *_FIGURES),
)
_LEAD_COLUMNS = (
    *(
        "lead_id",
        "customer_global_id",
        "lead_no",
        "current_stage",
        "opened_at",
        "last_order_at",
        "closed_at",
        "closed_by",
    ),
    *_FIGURES,
)

# 修剪只做一次：写成 MATERIALIZED 的 CTE 比直接联接快（1M 行 10.6 秒对 12.4 秒）
_ORDERS = f"""
    WITH trimmed AS MATERIALIZED (
        SELECT
            btrim(shop, {_WHITE}) AS shop,
            btrim(order_id, {_WHITE}) AS order_id,
            btrim(customer_name, {_WHITE}) AS customer_nickname,
            nullif(btrim(order_status, {_WHITE}), '') AS latest_status,
            nullif(btrim(order_type, {_WHITE}), '') AS raw_order_type,
            amount,
            quantity,
            ordered_at,
            CASE WHEN isfinite(ordered_at) THEN (ordered_at AT TIME ZONE 'Asia/Shanghai')::date END AS order_date,
            import_id,
            raw_id
        FROM public.raw_orders
    )
    INSERT INTO {SCHEMA}.orders AS t ({", ".join(_ORDER_COLUMNS)})
    SELECT DISTINCT ON (shop_id, order_id)
        shop_id,
        order_id,
        customer_nickname,
        coalesce(latest_status, 'unknown'),
        r.raw_order_type,
        CASE WHEN m.system_order_type IN ('SAMPLE', 'PROOF', 'BULK') THEN m.system_order_type ELSE 'BULK' END,
        coalesce(amount, 0),
        coalesce(quantity, 1),
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

_TYPES = ("SAMPLE", "PROOF", "BULK")
_CANCELLED, _COMPLETED = (
    ", ".join(f"'{status}'" for status in EtlSettings.model_fields[name].default)
    for name in ("cancelled_statuses", "completed_statuses")
)
_COUNTED = f"""lower(o.latest_status) NOT IN ({_CANCELLED})"""
_WON = f"""o.system_order_type = 'BULK' AND lower(o.latest_status) IN ({_COMPLETED})"""
_CUSTOMER_ORDERS = """public.orders o JOIN etl.order_index x USING (shop_id, order_id)"""

_CUSTOMERS = f"""
    INSERT INTO {SCHEMA}.customers AS t ({", ".join(_CUSTOMER_COLUMNS)})
    SELECT
        md5(customer_key)::uuid,
        customer_key,
        left(customer_key, 36)::uuid,
        (array_agg(o.customer_nickname ORDER BY ordered_at DESC, order_id DESC))[1],
        min(ordered_at) FILTER (WHERE {_COUNTED}),
        max(ordered_at) FILTER (WHERE {_COUNTED}),
        count(*) FILTER (WHERE {_COUNTED}),
        coalesce(sum(amount) FILTER (WHERE {_COUNTED}), 0),
        {", ".join(f"count(*) FILTER (WHERE system_order_type = '{kind}' AND {_COUNTED})" for kind in _TYPES)},
        {", ".join(f"coalesce(sum(amount) FILTER (WHERE system_order_type = '{kind}' AND {_COUNTED}), 0)" for kind in _TYPES)}
    FROM {_CUSTOMER_ORDERS}
    GROUP BY customer_key
    ORDER BY customer_key"""

_LEADS = f"""
    INSERT INTO {SCHEMA}.business_leads AS t ({", ".join(_LEAD_COLUMNS)})
    SELECT
        md5(customer_key || '#' || lead_no)::uuid,
        md5(customer_key)::uuid,
        lead_no,
        CASE
            WHEN bool_or(won) THEN 'WON'
            WHEN max(order_date) < (SELECT max(order_date) FROM public.orders) - 90 THEN 'COLD'
            ELSE 'OPEN'
        END,
        min(ordered_at),
        max(ordered_at),
        max(ordered_at) FILTER (WHERE won),
        CASE WHEN bool_or(won) THEN 'etl' END,
        {", ".join(f"count(*) FILTER (WHERE system_order_type = '{kind}')" for kind in _TYPES)},
        {", ".join(f"coalesce(sum(amount) FILTER (WHERE system_order_type = '{kind}'), 0)" for kind in _TYPES)}
    FROM (
        SELECT
            customer_key,
            ordered_at,
            o.order_date,
            system_order_type,
            amount,
            {_WON} AS won,
            1 + coalesce(sum(({_WON})::int) OVER (
                PARTITION BY customer_key ORDER BY ordered_at, order_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ), 0)::int AS lead_no
        FROM {_CUSTOMER_ORDERS}
        WHERE {_COUNTED}
    ) dealt
    GROUP BY customer_key, lead_no
    ORDER BY customer_key, lead_no"""


def prepare(engine: sa.Engine) -> None:
    """建好或清空自己的三张表。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        for table in ("orders", "customers", "business_leads"):
            connection.exec_driver_sql(
                f"CREATE TABLE IF NOT EXISTS {SCHEMA}.{table} (LIKE public.{table} INCLUDING ALL)"
            )
            connection.exec_driver_sql(f"TRUNCATE {SCHEMA}.{table}")


def load_orders(engine: sa.Engine) -> None:
    _upsert(engine, _ORDERS, _ORDER_COLUMNS, key=("shop_id", "order_id"))


def load_customers(engine: sa.Engine) -> None:
    _upsert(engine, _CUSTOMERS, _CUSTOMER_COLUMNS, key=("customer_key",))


def load_leads(engine: sa.Engine) -> None:
    _upsert(engine, _LEADS, _LEAD_COLUMNS, key=("customer_global_id", "lead_no"))


def _upsert(engine: sa.Engine, insert: str, columns: Sequence[str], *, key: Sequence[str]) -> None:
    values = [name for name in columns if name not in key]
    assignments = ", ".join(f"{name} = excluded.{name}" for name in values)
    existing, new = (", ".join(f"{row}.{name}" for name in values) for row in ("t", "excluded"))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"{insert} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {assignments}, updated_at = now() "
            f"WHERE ({existing}) IS DISTINCT FROM ({new})"
        )
