"""导入：像外围应用那样，import_tasks 与 raw_orders 在同一个事务里写好，还没有事件。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME


@dataclass(frozen=True)
class ImportedOrder:
    order_id: str
    customer: str
    day: date
    status: str = "completed"


def new_order(day: date, customer: str | None = None) -> ImportedOrder:
    """一个新订单；没有说是谁的，就是一个新客户的。"""
    order_id = f"B-{uuid4()}"
    return ImportedOrder(order_id, customer or f"新客户{order_id}", day)


def add_imports(engine: sa.Engine, orders: Sequence[ImportedOrder]) -> list[UUID]:
    """每个订单一次完成的导入；三张表都要变。"""
    return add_imports_of(engine, [[order] for order in orders])


def add_imports_of(engine: sa.Engine, imports: Sequence[Sequence[ImportedOrder]]) -> list[UUID]:
    """几次完成的导入，各有哪些订单。"""
    import_ids = [uuid4() for _ in imports]
    now = datetime.now(UTC)
    tasks = [
        {"import_id": import_id, "status": "completed", "row_count": len(orders), "completed_at": now}
        for import_id, orders in zip(import_ids, imports, strict=True)
    ]
    rows = [
        {
            "import_id": import_id,
            "shop": SAMPLE_SHOP_NAME,
            "order_id": order.order_id,
            "customer_name": order.customer,
            "order_type": "大货订单",
            "order_status": order.status,
            "amount": "120.50",
            "quantity": 1,
            "ordered_at": datetime.combine(order.day, time(4), UTC),
        }
        for import_id, orders in zip(import_ids, imports, strict=True)
        for order in orders
    ]
    with engine.begin() as connection:
        connection.execute(sa.insert(import_tasks), tasks)
        connection.execute(sa.insert(raw_orders), rows)
    return import_ids
