"""订单：赢家的值，以及若干订单的合计。"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

from tests.reference.instants import Instant, to_datetime
from tests.reference.raw_orders import JudgedRow
from tests.reference.result import Row

SYSTEM_TYPES = ("SAMPLE", "PROOF", "BULK")


@dataclass(frozen=True, kw_only=True)
class Order:
    """一个订单的当前值。"""

    shop_id: UUID
    order_id: str
    customer_nickname: str
    latest_status: str
    raw_order_type: str | None
    system_order_type: str
    amount: Decimal
    quantity: int
    ordered_at: Instant
    order_date: date
    import_id: UUID
    raw_id: int

    @property
    def sequence(self) -> tuple[Instant, str]:
        """客户的订单之间的先后；Python 的 str 本来就按码点比较。"""
        return (self.ordered_at, self.order_id)


def build_order(winner: JudgedRow, mapped_type: str | None) -> Order:
    """:param mapped_type: 映射表给这个类型的值；缺失或没有映射则为 None。"""
    raw = winner.raw
    assert winner.rule is None
    assert winner.shop_id is not None
    assert winner.day is not None
    assert raw.order_id is not None
    assert raw.customer_name is not None
    assert raw.ordered_at is not None
    return Order(
        shop_id=winner.shop_id,
        order_id=raw.order_id,
        customer_nickname=raw.customer_name,
        latest_status=raw.order_status if raw.order_status is not None else "unknown",
        raw_order_type=raw.order_type,
        system_order_type=mapped_type if mapped_type in SYSTEM_TYPES else "BULK",
        amount=raw.amount if raw.amount is not None else Decimal(0),
        quantity=raw.quantity if raw.quantity is not None else 1,
        ordered_at=raw.ordered_at,
        order_date=winner.day,
        import_id=raw.import_id,
        raw_id=raw.raw_id,
    )


def build_order_row(order: Order) -> Row:
    return {
        "shop_id": order.shop_id,
        "order_id": order.order_id,
        "customer_nickname": order.customer_nickname,
        "latest_status": order.latest_status,
        "raw_order_type": order.raw_order_type,
        "system_order_type": order.system_order_type,
        "amount": order.amount,
        "quantity": order.quantity,
        "ordered_at": to_datetime(order.ordered_at),
        "order_date": order.order_date,
        "import_id": order.import_id,
        "raw_id": order.raw_id,
    }


def total_amount(orders: Collection[Order]) -> Decimal:
    return sum((order.amount for order in orders), Decimal(0))


def build_figures(orders: Collection[Order]) -> Row:
    """每种系统类型的笔数与金额；客户与商机同形。"""
    figures: Row = {}
    for system_type in SYSTEM_TYPES:
        of_type = [order for order in orders if order.system_order_type == system_type]
        figures[f"{system_type.lower()}_count"] = len(of_type)
        figures[f"{system_type.lower()}_amount"] = total_amount(of_type)
    return figures
