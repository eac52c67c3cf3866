"""表结构。`application` 是外围应用已有的表，ETL 从不改它们的结构；`etl` 是 ETL 自己的表。"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.text import WHITE_SPACE

# 写明 schema：角色若也叫 etl，search_path 里的 "$user" 会让没写 schema 的表落进 schema etl
APPLICATION_SCHEMA = "public"
application = sa.MetaData(schema=APPLICATION_SCHEMA)
etl = sa.MetaData(schema="etl")

TIMESTAMP = sa.DateTime(timezone=True)
AMOUNT = sa.Numeric(14, 2)
TOTAL = sa.Numeric(20, 2)


def trimmed(column: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """SQL 里的修剪，与 Polars 的 strip_chars() 去掉同样的字符；索引与查询共用这一个表达式。"""
    return sa.func.btrim(column, sa.literal_column("E'" + "".join(f"\\u{ord(char):04X}" for char in WHITE_SPACE) + "'"), type_=sa.Text())


def order_id_key(order_id: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """SQL：订单号修剪之后的前 501 个字，按它找版本。

    有效的订单号最多 500 个字，与它相等就是整个相等；而再长的坏值也放得进索引。
    """
    return sa.func.left(trimmed(order_id), sa.text("501"), type_=sa.Text())


# ---- 只读：平台导出与配置 -------------------------------------------------------

import_tasks = sa.Table(
    "import_tasks",
    application,
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("source_name", sa.Text),
    sa.Column("status", sa.Text),
    sa.Column("row_count", sa.Integer),
    sa.Column("created_at", TIMESTAMP, server_default=sa.func.now()),
    sa.Column("completed_at", TIMESTAMP),
)
sa.Index("ix_import_tasks_completed_at", import_tasks.c.completed_at)

raw_orders = sa.Table(
    "raw_orders",
    application,
    sa.Column("raw_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("import_id", sa.Uuid),
    sa.Column("order_id", sa.Text),
    sa.Column("shop", sa.Text),
    sa.Column("customer_name", sa.Text),
    sa.Column("order_type", sa.Text),
    sa.Column("order_status", sa.Text),
    sa.Column("amount", AMOUNT),
    sa.Column("quantity", sa.Integer),
    sa.Column("ordered_at", TIMESTAMP),
    sa.Column("extra", pg.JSONB(none_as_null=True)),
)
sa.Index("ix_raw_orders_import_id", raw_orders.c.import_id)
sa.Index("ix_raw_orders_ordered_at", raw_orders.c.ordered_at)
sa.Index("ix_raw_orders_order", order_id_key(raw_orders.c.order_id))

shop_configs = sa.Table(
    "shop_configs",
    application,
    sa.Column("shop_id", sa.Uuid, primary_key=True),
    sa.Column("shop_name", sa.Text, unique=True),
    sa.Column("platform", sa.Text),
)

order_type_mappings = sa.Table(
    "order_type_mappings",
    application,
    sa.Column("raw_order_type", sa.Text, primary_key=True),
    sa.Column("system_order_type", sa.Text),
)


# ---- 写入：三张结果表 -----------------------------------------------------------


def _figures() -> list[sa.Column[Any]]:
    """按系统订单类型的笔数与金额；客户与商机两张表同形。"""
    counts = [sa.Column(f"{kind}_count", sa.Integer) for kind in ("sample", "proof", "bulk")]
    amounts = [sa.Column(f"{kind}_amount", TOTAL) for kind in ("sample", "proof", "bulk")]
    return [*counts, *amounts]


def _timestamps() -> list[sa.Column[Any]]:
    return [
        sa.Column("created_at", TIMESTAMP, server_default=sa.func.now()),
        sa.Column("updated_at", TIMESTAMP, server_default=sa.func.now()),
    ]


@dataclass(frozen=True)
class TargetTables:
    """一个目标 schema 里的三张结果表；schema 名也是台账的 target。"""

    schema: str
    orders: sa.Table
    customers: sa.Table
    leads: sa.Table


def _define_targets(metadata: sa.MetaData, schema: str) -> tuple[sa.Table, sa.Table, sa.Table]:
    orders = sa.Table(
        "orders",
        metadata,
        sa.Column("shop_id", sa.Uuid, primary_key=True),
        sa.Column("order_id", sa.Text, primary_key=True),
        sa.Column("customer_nickname", sa.Text),
        sa.Column("latest_status", sa.Text),
        sa.Column("raw_order_type", sa.Text),
        sa.Column("system_order_type", sa.Text),
        sa.Column("amount", AMOUNT),
        sa.Column("quantity", sa.Integer),
        sa.Column("ordered_at", TIMESTAMP),
        sa.Column("order_date", sa.Date, index=True),
        sa.Column("import_id", sa.Uuid),
        sa.Column("raw_id", sa.BigInteger),
        *_timestamps(),
        schema=schema,
    )
    customers = sa.Table(
        "customers",
        metadata,
        sa.Column("customer_global_id", sa.Uuid, primary_key=True),
        sa.Column("customer_key", sa.Text, unique=True),
        sa.Column("shop_id", sa.Uuid),
        sa.Column("customer_nickname", sa.Text),
        sa.Column("first_order_at", TIMESTAMP),
        sa.Column("last_order_at", TIMESTAMP),
        sa.Column("order_count", sa.Integer),
        sa.Column("total_amount", TOTAL),
        *_figures(),
        *_timestamps(),
        schema=schema,
    )
    leads = sa.Table(
        "business_leads",
        metadata,
        sa.Column("lead_id", sa.Uuid, primary_key=True),
        sa.Column("customer_global_id", sa.Uuid),
        sa.Column("lead_no", sa.Integer),
        sa.Column("current_stage", sa.Text),
        sa.Column("opened_at", TIMESTAMP),
        sa.Column("last_order_at", TIMESTAMP),
        sa.Column("closed_at", TIMESTAMP),
        sa.Column("closed_by", sa.Text),
        *_figures(),
        sa.Column("owner", sa.Text),
        sa.Column("notes", sa.Text),
        *_timestamps(),
        sa.UniqueConstraint("customer_global_id", "lead_no"),
        schema=schema,
    )
    return orders, customers, leads


_define_targets(application, APPLICATION_SCHEMA)


@lru_cache(maxsize=8)
def target_tables(schema: str) -> TargetTables:
    """目标 schema 里三张结果表的定义。"""
    orders, customers, leads = _define_targets(sa.MetaData(), schema)
    return TargetTables(schema=schema, orders=orders, customers=customers, leads=leads)


# ---- ETL 自己的表，schema etl ---------------------------------------------------

installation = sa.Table(
    "installation",
    etl,
    sa.Column("installation_id", sa.Uuid, primary_key=True, server_default=sa.func.gen_random_uuid()),
    comment="one row: tells this installation's own completion events from those of another ETL",
)

ledger = sa.Table(
    "ledger",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("requested", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("materialized", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("requested_at", TIMESTAMP),
    sa.Column("materialized_at", TIMESTAMP),
    sa.Column("run_id", sa.Text),
    sa.Column("allow_deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("retry_at", TIMESTAMP),
    sa.Column("held_reason", sa.Text),
    sa.Column("failed_run_id", sa.Text),
    comment="per asset and day: due while requested > materialized",
)
sa.Index(
    "ix_ledger_due",
    ledger.c.target,
    ledger.c.day,
    postgresql_where=ledger.c.requested > ledger.c.materialized,
)

import_events = sa.Table(
    "import_events",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, nullable=False),
    sa.Column("handled_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    sa.Column("stream_sequence", sa.BigInteger),
    comment="the newest handled event of each import",
)

import_requests = sa.Table(
    "import_requests",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    comment="the ledger revision of orders at which an import asked for a day",
)
sa.Index("ix_import_requests_day", import_requests.c.target, import_requests.c.day, import_requests.c.revision)

waiting_events = sa.Table(
    "waiting_events",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("event_id", sa.Uuid, primary_key=True),
    sa.Column("allow_deletes", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stream_sequence", sa.BigInteger, nullable=False),
    sa.Column("stored_at", TIMESTAMP, nullable=False),
    sa.Column("looks", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("look_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    comment="events whose import is not completed yet: taken in with it, or dead-lettered",
)
sa.Index("ix_waiting_events_look_at", waiting_events.c.target, waiting_events.c.look_at)

import_watches = sa.Table(
    "import_watches",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("watched_from", TIMESTAMP, nullable=False),
    sa.Column("watched_until", TIMESTAMP, nullable=False),
    comment="imports completed between these moments were announced, or taken in without an event",
)

leases = sa.Table(
    "leases",
    etl,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("token", sa.Uuid, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("first_day", sa.Date),
    sa.Column("last_day", sa.Date),
    sa.Column("acquired_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("expires_at", TIMESTAMP, nullable=False),
    sa.Column("cancel_requested_at", TIMESTAMP),
    comment="one row per running run, by the database's clock; checked in the data transaction",
)

locks = sa.Table(
    "locks",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("key", sa.Integer, primary_key=True),
    comment="rows that stand for days, customers (striped), imports (striped) and the claim; locked in sorted order",
)

cold_sweeps = sa.Table(
    "cold_sweeps",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("last_warm_day", sa.Date),
    sa.Column("rollout", sa.Text, nullable=False),
    comment="leads without closed_at, of the customers in this share, are COLD if their last order is before last_warm_day, else OPEN",
)

# target 放在主键最后：它几乎总是同一个值
order_index = sa.Table(
    "order_index",
    etl,
    sa.Column("shop_id", sa.Uuid, primary_key=True),
    sa.Column("order_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("customer_nickname", sa.Text),
    sa.Column("customer_key", sa.Text, nullable=False),
    sa.Column("order_date", sa.Date),
    comment="order -> customer, written with the order: finding a customer's orders needs no scan",
)
# 散列索引：比文字短，写得快，名字再长也放得进
sa.Index("ix_order_index_customer", order_index.c.customer_key, postgresql_using="hash")

stale_customers = sa.Table(
    "stale_customers",
    etl,
    sa.Column("mark_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("customer_key", sa.Text, nullable=False),
    comment="customers that an order left; each mark is its own version and is deleted by the run that repaired it",
)
sa.Index("ix_stale_customers", stale_customers.c.target, stale_customers.c.asset)

rejected_rows = sa.Table(
    "rejected_rows",
    etl,
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("raw_id", sa.BigInteger, primary_key=True),
    sa.Column("import_id", sa.Uuid, nullable=False),
    sa.Column("day", sa.Date),
    sa.Column("rule", sa.Text, nullable=False),
    comment="one row per rejected raw row; day is NULL when the row has no business day",
)
sa.Index("ix_rejected_rows_import", rejected_rows.c.target, rejected_rows.c.import_id)
sa.Index("ix_rejected_rows_day", rejected_rows.c.target, rejected_rows.c.day)

outbox = sa.Table(
    "outbox",
    etl,
    sa.Column("outbox_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("event_id", sa.Uuid, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("payload", pg.JSONB, nullable=False),
    sa.Column("created_at", TIMESTAMP, nullable=False, server_default=sa.func.now()),
    sa.Column("problem", sa.Text),
    sa.Column("retry_at", TIMESTAMP),
    comment="completion events written in the data transaction; deleted once NATS has stored them",
)

troubles = sa.Table(
    "troubles",
    etl,
    sa.Column("process", sa.Text, primary_key=True),
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("times", sa.Integer, nullable=False, server_default=sa.text("1")),
    sa.Column("first_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("last_at", TIMESTAMP, nullable=False, server_default=sa.func.clock_timestamp()),
    comment="what went wrong beside the work of a process; shown by status and doctor",
)
