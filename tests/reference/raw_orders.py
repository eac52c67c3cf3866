"""原始行：修剪、逐行判定、选出每个订单的赢家（DOMAIN 第 3 节）。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from uuid import UUID

from tests.reference.instants import Instant, business_day
from tests.reference.settings import ReferenceSettings
from tests.reference.text import trim_or_missing

LONGEST_TEXT = 500


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """已完成导入的一行；`completed_at` 是它那次导入的。"""

    raw_id: int
    import_id: UUID
    completed_at: Instant | None
    order_id: str | None
    shop: str | None
    customer_name: str | None
    order_type: str | None
    order_status: str | None
    amount: Decimal | None
    quantity: int | None
    ordered_at: Instant | None


@dataclass(frozen=True)
class JudgedRow:
    """判定过的一行；`rule` 为 None 就是有效，此时 `shop_id` 与 `day` 都有值。"""

    raw: RawRow
    shop_id: UUID | None
    day: date | None
    rule: str | None


def clean(raw: RawRow) -> RawRow:
    """文字修剪过、空串成了缺失的同一行。"""
    return replace(
        raw,
        order_id=trim_or_missing(raw.order_id),
        shop=trim_or_missing(raw.shop),
        customer_name=trim_or_missing(raw.customer_name),
        order_type=trim_or_missing(raw.order_type),
        order_status=trim_or_missing(raw.order_status),
    )


def judge(raw: RawRow, shop_id: UUID | None, settings: ReferenceSettings) -> JudgedRow:
    """:param raw: 修剪过的行。:param shop_id: 店名对应的店；没有这个店名则为 None。"""
    day = business_day(raw.ordered_at, settings.zone) if raw.ordered_at is not None else None
    return JudgedRow(raw, shop_id, day, _first_broken_rule(raw, shop_id, day, settings))


def _first_broken_rule(raw: RawRow, shop_id: UUID | None, day: date | None, settings: ReferenceSettings) -> str | None:
    rules = (
        ("missing_order_id", raw.order_id is None),
        ("missing_shop", raw.shop is None),
        ("unknown_shop", shop_id is None),
        ("missing_customer_name", raw.customer_name is None),
        ("missing_ordered_at", raw.ordered_at is None),
        ("bad_ordered_at", day is None),
        ("outside_partitions", day is not None and not settings.partitions_start <= day <= settings.last_partition),
        ("bad_amount", raw.amount is not None and raw.amount.is_nan()),
        ("negative_quantity", raw.quantity is not None and raw.quantity < 0),
        ("text_too_long", max(len(raw.order_id or ""), len(raw.customer_name or "")) > LONGEST_TEXT),
    )
    return next((rule for rule, is_broken in rules if is_broken), None)


def pick_winners(rows: Iterable[JudgedRow]) -> list[JudgedRow]:
    """每个（店，订单号）最新的有效行。"""
    winners: dict[tuple[UUID | None, str | None], JudgedRow] = {}
    for row in rows:
        if row.rule is not None:
            continue
        order = (row.shop_id, row.raw.order_id)
        if order not in winners or _age(row) > _age(winners[order]):
            winners[order] = row
    return list(winners.values())


def _age(row: JudgedRow) -> tuple[bool, Decimal, int]:
    """越大越新；没有 completed_at 的比 '-infinity' 还旧。"""
    completed_at = row.raw.completed_at
    return (completed_at is not None, completed_at if completed_at is not None else Decimal(0), row.raw.raw_id)
