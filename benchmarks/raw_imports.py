"""一次导入一个新订单：像外围应用那样，import_tasks 与 raw_orders 在同一个事务里写好，还没有事件。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.tables import import_tasks, order_type_mappings, raw_orders, shop_configs

_SHOP = "基准店"


def add_shop(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(shop_configs).values(shop_id=uuid4(), shop_name=_SHOP, platform="bench"))
        connection.execute(sa.insert(order_type_mappings).values(raw_order_type="大货订单", system_order_type="BULK"))


def add_imports(engine: sa.Engine, days: Sequence[date]) -> list[UUID]:
    """每一天一次完成的导入，各有一个新客户的一个新订单，三张表都要变。"""
    import_ids = [uuid4() for _ in days]
    now = datetime.now(UTC)
    tasks = [{"import_id": import_id, "status": "completed", "row_count": 1, "completed_at": now} for import_id in import_ids]
    orders = [
        {
            "import_id": import_id,
            "shop": _SHOP,
            "order_id": f"B-{import_id}",
            "customer_name": f"客户{import_id}",
            "order_type": "大货订单",
            "order_status": "completed",
            "amount": "120.50",
            "quantity": 1,
            "ordered_at": datetime.combine(day, time(4), UTC),
        }
        for import_id, day in zip(import_ids, days, strict=True)
    ]
    with engine.begin() as connection:
        connection.execute(sa.insert(import_tasks), tasks)
        connection.execute(sa.insert(raw_orders), orders)
    return import_ids
