"""商机：把客户的订单一个一个地发给商机 1、2、……（DOMAIN 第 5 节）。"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from uuid import UUID

from tests.reference.identities import new_lead_id
from tests.reference.instants import Instant, to_datetime
from tests.reference.orders import Order, build_figures
from tests.reference.result import Row
from tests.reference.settings import ReferenceSettings
from tests.reference.text import is_blank


@dataclass(frozen=True, kw_only=True)
class StoredLead:
    """business_leads 里已有的、有编号的一行：它的编号与人的列。"""

    lead_id: UUID
    customer_global_id: UUID | None
    lead_no: int
    current_stage: str | None
    closed_at: Instant | None
    closed_by: str | None
    owner: str | None
    notes: str | None

    @property
    def has_closing(self) -> bool:
        return self.closed_by == "user" and self.closed_at is not None

    @property
    def is_touched(self) -> bool:
        return self.has_closing or not is_blank(self.owner) or not is_blank(self.notes)


@dataclass
class DealtLead:
    """发到了订单的一个商机。"""

    orders: list[Order] = field(default_factory=list)
    is_won: bool = False


def deal(
    counted: Iterable[Order], closings: Mapping[int, Instant], settings: ReferenceSettings
) -> dict[int, DealtLead]:
    """:param counted: 计数的订单，由旧到新。:param closings: 人关闭的商机号 → closed_at。"""
    dealt: dict[int, DealtLead] = {}
    present = 1
    for order in counted:
        while present in closings and order.ordered_at > closings[present]:
            present += 1
        lead = dealt.setdefault(present, DealtLead())
        lead.orders.append(order)
        if present not in closings and order.system_order_type == "BULK" and settings.is_completed(order.latest_status):
            lead.is_won = True
            present += 1
    return dealt


def build_leads(
    customer_id: UUID,
    customer_key: str,
    counted: Iterable[Order],
    stored: Collection[StoredLead],
    newest_day: date,
    settings: ReferenceSettings,
) -> list[Row]:
    """一个客户的全部商机：发到了订单的，和没有订单但有人动过的。"""
    by_number = {lead.lead_no: lead for lead in stored}
    closings = {
        number: lead.closed_at for number, lead in by_number.items() if lead.has_closing and lead.closed_at is not None
    }
    dealt = deal(counted, closings, settings)
    rows = [
        _build_lead(customer_id, customer_key, number, lead, by_number.get(number), newest_day, settings)
        for number, lead in dealt.items()
    ]
    return rows + [build_empty_lead(lead) for lead in stored if lead.is_touched and lead.lead_no not in dealt]


def _build_lead(
    customer_id: UUID,
    customer_key: str,
    lead_no: int,
    dealt: DealtLead,
    stored: StoredLead | None,
    newest_day: date,
    settings: ReferenceSettings,
) -> Row:
    last = dealt.orders[-1]
    if stored is not None and stored.has_closing:
        closing = _closing_columns(stored)
    elif dealt.is_won:
        closing = {"current_stage": "WON", "closed_at": to_datetime(last.ordered_at), "closed_by": "etl"}
    else:
        is_cold = (newest_day - last.order_date).days > settings.cold_after_days
        closing = {"current_stage": "COLD" if is_cold else "OPEN", "closed_at": None, "closed_by": None}
    return {
        "lead_id": stored.lead_id if stored is not None else new_lead_id(customer_key, lead_no),
        "customer_global_id": customer_id,
        "lead_no": lead_no,
        "opened_at": to_datetime(dealt.orders[0].ordered_at),
        "last_order_at": to_datetime(last.ordered_at),
        **closing,
        **build_figures(dealt.orders),
        "owner": stored.owner if stored is not None else None,
        "notes": stored.notes if stored is not None else None,
    }


def build_empty_lead(stored: StoredLead) -> Row:
    """没有订单、但有人动过的商机。"""
    open_columns: Row = {"current_stage": "OPEN", "closed_at": None, "closed_by": None}
    return {
        "lead_id": stored.lead_id,
        "customer_global_id": stored.customer_global_id,
        "lead_no": stored.lead_no,
        "opened_at": None,
        "last_order_at": None,
        **(_closing_columns(stored) if stored.has_closing else open_columns),
        **build_figures([]),
        "owner": stored.owner,
        "notes": stored.notes,
    }


def _closing_columns(stored: StoredLead) -> Row:
    """人的关闭：阶段也是人的。"""
    assert stored.closed_at is not None
    return {
        "current_stage": stored.current_stage,
        "closed_at": to_datetime(stored.closed_at),
        "closed_by": stored.closed_by,
    }
