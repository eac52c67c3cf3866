"""客户：从他全部的订单算出一行（DOMAIN 第 4 节）。"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from tests.reference.identities import name_part
from tests.reference.instants import to_datetime
from tests.reference.orders import Order, build_figures, total_amount
from tests.reference.result import Row
from tests.reference.settings import ReferenceSettings


@dataclass(frozen=True, kw_only=True)
class StoredCustomer:
    """customers 里已有的一行：它的编号与键。"""

    customer_global_id: UUID
    customer_key: str | None
    shop_id: UUID | None


def count_in(orders: Collection[Order], settings: ReferenceSettings) -> list[Order]:
    """计数的订单，由旧到新。"""
    return sorted(
        (order for order in orders if not settings.is_cancelled(order.latest_status)), key=lambda order: order.sequence
    )


def build_customer(customer_id: UUID, customer_key: str, orders: Collection[Order], settings: ReferenceSettings) -> Row:
    """至少有一个订单的客户；订单全都取消了，也还有这一行。"""
    newest = max(orders, key=lambda order: order.sequence)
    return _build_row(customer_id, customer_key, newest.shop_id, newest.customer_nickname, count_in(orders, settings))


def build_left_customer(stored: StoredCustomer) -> Row:
    """已经没有订单提到、只因有人动过他的商机才留下的客户。"""
    key = stored.customer_key
    return _build_row(stored.customer_global_id, key, stored.shop_id, name_part(key) if key is not None else None, [])


def _build_row(
    customer_id: UUID, customer_key: str | None, shop_id: UUID | None, nickname: str | None, counted: list[Order]
) -> Row:
    return {
        "customer_global_id": customer_id,
        "customer_key": customer_key,
        "shop_id": shop_id,
        "customer_nickname": nickname,
        "first_order_at": to_datetime(counted[0].ordered_at) if counted else None,
        "last_order_at": to_datetime(counted[-1].ordered_at) if counted else None,
        "order_count": len(counted),
        "total_amount": total_amount(counted),
        **build_figures(counted),
    }
