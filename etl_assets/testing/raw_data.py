"""往测试数据库里放原始数据：店铺、类型映射、导入。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.tables import import_tasks, order_type_mappings, raw_orders, shop_configs

SAMPLE_SHOP = UUID("00000000-0000-4000-8000-000000000001")
SAMPLE_SHOP_NAME = "旗舰店"
SAMPLE_ORDER: Mapping[str, Any] = {
    "order_id": "A-1",
    "shop": SAMPLE_SHOP_NAME,
    "customer_name": "张三",
    "order_type": "大货订单",
    "order_status": "completed",
    "amount": "120.50",
    "quantity": 2,
    "ordered_at": datetime(2026, 1, 5, 4, 0, tzinfo=UTC),
}


class RawData:
    """一个数据库里的原始数据；`add_import` 之外的列缺省取自 SAMPLE_ORDER。"""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.add_shop(SAMPLE_SHOP, SAMPLE_SHOP_NAME)
        self.map_type("打样订单", "SAMPLE")
        self.map_type("产前样订单", "PROOF")
        self.map_type("大货订单", "BULK")

    def add_shop(self, shop_id: UUID, name: str) -> None:
        self._insert(shop_configs, shop_id=shop_id, shop_name=name, platform="test")

    def map_type(self, raw_order_type: str, system_order_type: str) -> None:
        self._insert(order_type_mappings, raw_order_type=raw_order_type, system_order_type=system_order_type)

    def add_import(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        status: str = "completed",
        completed_at: datetime | None = datetime(2026, 6, 1, tzinfo=UTC),
        import_id: UUID | None = None,
    ) -> UUID:
        """一次导入：一行一个原始订单；返回 import_id。"""
        import_id = import_id or uuid4()
        self._insert(
            import_tasks,
            import_id=import_id,
            source_name="test",
            status=status,
            row_count=len(rows),
            completed_at=completed_at,
        )
        with self._engine.begin() as connection:
            for row in rows:
                connection.execute(sa.insert(raw_orders).values(import_id=import_id, **{**SAMPLE_ORDER, **row}))
        return import_id

    def set_status(self, import_id: UUID, status: str) -> None:
        """改导入的状态，例如撤回（failed）。"""
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(import_tasks).where(import_tasks.c.import_id == import_id).values(status=status)
            )

    def _insert(self, table: sa.Table, **values: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.insert(table).values(**values))
