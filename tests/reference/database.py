"""参照实现的全部查询：都只读；查找一个店名、一个类型一次，客户与商机一次读全：库里有十万个订单也核对得完。

时刻以 epoch 秒读出：无穷大与公元前的 timestamptz，psycopg 装不进 datetime。
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from tests.reference.customers import StoredCustomer
from tests.reference.instants import to_datetime
from tests.reference.leads import StoredLead
from tests.reference.raw_orders import RawRow
from tests.reference.result import Row

_IMPORT_TASKS = sa.table("import_tasks", sa.column("import_id"), sa.column("status"), sa.column("completed_at"))
_RAW_TEXTS = ("order_id", "shop", "customer_name", "order_type", "order_status")
_RAW_ORDERS = sa.table(
    "raw_orders",
    *(sa.column(name) for name in ("raw_id", "import_id", *_RAW_TEXTS, "amount", "quantity", "ordered_at")),
)
_SHOP_CONFIGS = sa.table("shop_configs", sa.column("shop_id"), sa.column("shop_name"))
_TYPE_MAPPINGS = sa.table("order_type_mappings", sa.column("raw_order_type"), sa.column("system_order_type"))

_FIGURE_COLUMNS = ("sample_count", "proof_count", "bulk_count", "sample_amount", "proof_amount", "bulk_amount")
_ORDER_COLUMNS = (
    *("shop_id", "order_id", "customer_nickname", "latest_status", "raw_order_type", "system_order_type"),
    *("amount", "quantity", "ordered_at", "order_date", "import_id", "raw_id"),
)
_CUSTOMER_COLUMNS = (
    *("customer_global_id", "customer_key", "shop_id", "customer_nickname", "first_order_at", "last_order_at"),
    *("order_count", "total_amount", *_FIGURE_COLUMNS),
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
    *(*_FIGURE_COLUMNS, "owner", "notes"),
)
_TIME_COLUMNS = frozenset({"ordered_at", "first_order_at", "last_order_at", "opened_at", "closed_at"})


def _epoch(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.extract("epoch", column)


def _target(schema: str, name: str, columns: Sequence[str]) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns), schema=schema)


def read_raw_rows(connection: sa.Connection) -> Iterator[RawRow]:
    """已完成的各次导入的行。"""
    raw = _RAW_ORDERS.c
    rows = connection.execute(
        sa.select(
            raw.raw_id,
            raw.import_id,
            *(raw[name] for name in _RAW_TEXTS),
            raw.amount,
            raw.quantity,
            _epoch(raw.ordered_at).label("ordered_at"),
            _epoch(_IMPORT_TASKS.c.completed_at).label("completed_at"),
        )
        .join_from(_RAW_ORDERS, _IMPORT_TASKS, raw.import_id == _IMPORT_TASKS.c.import_id)
        .where(_IMPORT_TASKS.c.status == "completed")
    )
    for row in rows:
        yield RawRow(**row._mapping)


def find_shop_id(connection: sa.Connection, shop_name: str) -> UUID | None:
    """店名照存的样子比较。"""
    return connection.scalar(sa.select(_SHOP_CONFIGS.c.shop_id).where(_SHOP_CONFIGS.c.shop_name == shop_name))


def find_mapped_type(connection: sa.Connection, raw_type: str) -> str | None:
    return connection.scalar(
        sa.select(_TYPE_MAPPINGS.c.system_order_type).where(_TYPE_MAPPINGS.c.raw_order_type == raw_type)
    )


def read_stored_customers(connection: sa.Connection, schema: str) -> list[StoredCustomer]:
    customers = _target(schema, "customers", ("customer_global_id", "customer_key", "shop_id"))
    return [StoredCustomer(**row._mapping) for row in connection.execute(sa.select(customers))]


def find_stored_leads(connection: sa.Connection, schema: str, customer_id: UUID) -> list[StoredLead]:
    """一个客户的；逐行的基准用它。"""
    leads = _target(schema, "business_leads", _LEAD_COLUMNS)
    return _read_stored_leads(connection, leads, leads.c.customer_global_id == customer_id)


def read_stored_leads(connection: sa.Connection, schema: str) -> dict[UUID, list[StoredLead]]:
    """客户 → 他的有编号的商机。"""
    leads = _target(schema, "business_leads", _LEAD_COLUMNS)
    by_customer: defaultdict[UUID, list[StoredLead]] = defaultdict(list)
    for lead in _read_stored_leads(connection, leads, sa.true()):
        by_customer[lead.customer_global_id].append(lead)
    return by_customer


def read_ownerless_leads(connection: sa.Connection, schema: str) -> list[StoredLead]:
    """customers 里没有它的客户的商机。"""
    leads = _target(schema, "business_leads", _LEAD_COLUMNS)
    customers = _target(schema, "customers", ("customer_global_id",))
    of_customer = sa.select(customers).where(customers.c.customer_global_id == leads.c.customer_global_id)
    return _read_stored_leads(connection, leads, ~of_customer.exists())


def _read_stored_leads(
    connection: sa.Connection, leads: sa.TableClause, condition: sa.ColumnElement[bool]
) -> list[StoredLead]:
    columns = (
        leads.c[name]
        for name in ("lead_id", "customer_global_id", "lead_no", "current_stage", "closed_by", "owner", "notes")
    )
    query = sa.select(*columns, _epoch(leads.c.closed_at).label("closed_at")).where(
        condition, leads.c.lead_no.is_not(None)
    )
    return [StoredLead(**row._mapping) for row in connection.execute(query)]


def read_orders(connection: sa.Connection, schema: str) -> list[Row]:
    return _read_rows(connection, _target(schema, "orders", _ORDER_COLUMNS))


def read_customers(connection: sa.Connection, schema: str) -> list[Row]:
    return _read_rows(connection, _target(schema, "customers", _CUSTOMER_COLUMNS))


def read_leads(connection: sa.Connection, schema: str) -> list[Row]:
    return _read_rows(connection, _target(schema, "business_leads", _LEAD_COLUMNS))


def read_unnumbered_leads(connection: sa.Connection, schema: str) -> list[Row]:
    """没有编号的商机，照现在的样子。"""
    return [row for row in read_leads(connection, schema) if row["lead_no"] is None]


def read_rejected(connection: sa.Connection, schema: str) -> list[Row]:
    rejected = _target("etl", "rejected_rows", ("target", "raw_id", "import_id", "rule", "day"))
    columns = (rejected.c[name] for name in ("raw_id", "import_id", "rule", "day"))
    return [dict(row._mapping) for row in connection.execute(sa.select(*columns).where(rejected.c.target == schema))]


def _read_rows(connection: sa.Connection, table: sa.TableClause) -> list[Row]:
    columns = [
        _epoch(column).label(column.name) if column.name in _TIME_COLUMNS else column for column in table.columns
    ]
    rows: list[Row] = [dict(row._mapping) for row in connection.execute(sa.select(*columns))]
    for row in rows:
        for name in _TIME_COLUMNS & row.keys():
            row[name] = to_datetime(row[name]) if row[name] is not None else None
    return rows
