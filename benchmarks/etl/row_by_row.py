"""从前的做法：一行原始记录一个事务，每一步一个查询，依次写它的订单、客户、商机，写进自己的 schema。

判定与换算取自测试的参照实现（DOMAIN.md 的独立读法），与产品没有共用的代码；写法是这里的。不故意放慢：
一个连接做到底，语句都预编译，没有变化的行不写，客户的订单有索引可查。
只做基准的数据里有的事：没有改名换姓的订单、撤回的导入、人碰过的商机。
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.settings import EtlSettings
from tests.reference import database
from tests.reference.customers import build_customer, count_in
from tests.reference.identities import build_customer_key, new_customer_id
from tests.reference.instants import to_instant
from tests.reference.leads import build_leads
from tests.reference.orders import Order, build_order, build_order_row
from tests.reference.raw_orders import JudgedRow, RawRow, clean, judge
from tests.reference.result import Row
from tests.reference.settings import ReferenceSettings

SCHEMA = "row_by_row"

_ORDER_KEY = ("shop_id", "order_id")
_LEAD_KEY = ("customer_global_id", "lead_no")
_ORDER_COLUMNS = (
    *_ORDER_KEY,
    *("customer_nickname", "latest_status", "raw_order_type", "system_order_type"),
    *("amount", "quantity", "ordered_at", "order_date", "import_id", "raw_id"),
)
_FIGURES = ("sample_count", "proof_count", "bulk_count", "sample_amount", "proof_amount", "bulk_amount")
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
    *(*_FIGURES, "owner", "notes"),
)


def _table(name: str, columns: tuple[str, ...]) -> sa.TableClause:
    return sa.table(name, *map(sa.column, (*columns, "updated_at")), schema=SCHEMA)


_ORDERS = _table("orders", _ORDER_COLUMNS)
_CUSTOMERS = _table("customers", _CUSTOMER_COLUMNS)
_LEADS = _table("business_leads", _LEAD_COLUMNS)
_IMPORT_TASKS = sa.table("import_tasks", sa.column("import_id"), sa.column("completed_at"))


def prepare(engine: sa.Engine) -> None:
    """建好或清空自己的三张表。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        for table in ("orders", "customers", "business_leads"):
            connection.exec_driver_sql(
                f"CREATE TABLE IF NOT EXISTS {SCHEMA}.{table} (LIKE public.{table} INCLUDING ALL)"
            )
            connection.exec_driver_sql(f"TRUNCATE {SCHEMA}.{table}")
        connection.exec_driver_sql(
            f"CREATE INDEX IF NOT EXISTS ix_orders_customer ON {SCHEMA}.orders (shop_id, customer_nickname)"
        )


def load_all(engine: sa.Engine, settings: EtlSettings) -> None:
    """每行原始记录像一条消息那样单独处理、单独提交；最后照最新的业务日改 COLD。"""
    reference = ReferenceSettings.like(settings)
    with engine.connect() as connection:
        with connection.begin():
            messages = list(database.read_raw_rows(connection))
        for message in messages:
            with connection.begin():
                _handle(connection, clean(message), reference)
        with connection.begin():
            _sweep_cold(connection, reference)


def _handle(connection: sa.Connection, raw: RawRow, settings: ReferenceSettings) -> None:
    shop_id = database.find_shop_id(connection, raw.shop) if raw.shop is not None else None
    judged = judge(raw, shop_id, settings)
    if judged.rule is not None:
        return
    stored = _find(connection, _ORDERS, shop_id=shop_id, order_id=raw.order_id)
    if stored is not None and not _is_newer(connection, judged, stored):
        return
    mapped_type = database.find_mapped_type(connection, raw.order_type) if raw.order_type is not None else None
    order = build_order(judged, mapped_type)
    _write(connection, _ORDERS, _ORDER_KEY, stored, build_order_row(order))
    _write_customer_and_leads(connection, order.shop_id, order.customer_nickname, settings)


def _is_newer(connection: sa.Connection, judged: JudgedRow, stored: Row) -> bool:
    """与写着的那个版本比：先比导入完成的时刻（没有的最旧），再比 raw_id。"""
    completed_at = sa.cast(sa.extract("epoch", _IMPORT_TASKS.c.completed_at), sa.Numeric)
    stored_completed_at = connection.scalar(
        sa.select(completed_at).where(_IMPORT_TASKS.c.import_id == stored["import_id"])
    )
    return _age(judged.raw.completed_at, judged.raw.raw_id) > _age(stored_completed_at, stored["raw_id"])


def _age(completed_at: Decimal | None, raw_id: int) -> tuple[bool, Decimal, int]:
    return (completed_at is not None, completed_at or Decimal(0), raw_id)


def _write_customer_and_leads(
    connection: sa.Connection, shop_id: UUID, nickname: str, settings: ReferenceSettings
) -> None:
    orders = _read_customer_orders(connection, shop_id, nickname)
    customer_key = build_customer_key(shop_id, nickname)
    stored = _find(connection, _CUSTOMERS, customer_key=customer_key)
    customer_id: UUID = stored["customer_global_id"] if stored is not None else new_customer_id(customer_key)
    _write(
        connection,
        _CUSTOMERS,
        ("customer_global_id",),
        stored,
        build_customer(customer_id, customer_key, orders, settings),
    )

    stored_leads = database.find_stored_leads(connection, SCHEMA, customer_id)
    leads = build_leads(
        customer_id, customer_key, count_in(orders, settings), stored_leads, _read_newest_day(connection), settings
    )
    for lead in leads:
        _write(
            connection, _LEADS, _LEAD_KEY, _find(connection, _LEADS, **{name: lead[name] for name in _LEAD_KEY}), lead
        )
    for lead_no in {lead.lead_no for lead in stored_leads} - {lead["lead_no"] for lead in leads}:
        connection.execute(sa.delete(_LEADS).where(_matches(_LEADS, customer_global_id=customer_id, lead_no=lead_no)))


def _read_customer_orders(connection: sa.Connection, shop_id: UUID, nickname: str) -> list[Order]:
    rows = connection.execute(
        sa.select(*[_ORDERS.c[name] for name in _ORDER_COLUMNS]).where(
            _matches(_ORDERS, shop_id=shop_id, customer_nickname=nickname)
        )
    )
    return [Order(**{**row._mapping, "ordered_at": to_instant(row.ordered_at)}) for row in rows]


def _read_newest_day(connection: sa.Connection) -> date:
    newest: date = connection.execute(sa.select(sa.func.max(_ORDERS.c.order_date))).scalar_one()
    return newest


def _sweep_cold(connection: sa.Connection, settings: ReferenceSettings) -> None:
    """早先写下的商机，到最后可能已经冷了：逐个看，变了的改。"""
    newest_day = _read_newest_day(connection)
    open_leads = connection.execute(sa.select(_LEADS).where(_LEADS.c.closed_at.is_(None))).mappings().all()
    for lead in open_leads:
        idle_days = (newest_day - lead["last_order_at"].astimezone(settings.zone).date()).days
        stage = "COLD" if idle_days > settings.cold_after_days else "OPEN"
        if lead["current_stage"] != stage:
            connection.execute(sa.update(_LEADS).where(_LEADS.c.lead_id == lead["lead_id"]).values(current_stage=stage))


def _find(connection: sa.Connection, table: sa.TableClause, **key: Any) -> Row | None:
    columns = [column for column in table.columns if column.name != "updated_at"]
    row = connection.execute(sa.select(*columns).where(_matches(table, **key))).mappings().one_or_none()
    return dict(row) if row is not None else None


def _write(
    connection: sa.Connection, table: sa.TableClause, key: tuple[str, ...], stored: Row | None, row: Mapping[str, Any]
) -> None:
    if stored is None:
        connection.execute(sa.insert(table).values(**row))
    elif stored != row:
        connection.execute(
            sa.update(table)
            .where(_matches(table, **{name: row[name] for name in key}))
            .values(**row, updated_at=sa.func.now())
        )


def _matches(table: sa.TableClause, **values: Any) -> sa.ColumnElement[bool]:
    return sa.and_(*[table.c[name] == value for name, value in values.items()])
