"""商机：订单怎样分到编号，商机的列怎样得出。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from etl_assets.leads.dealing import deal_orders
from etl_assets.leads.etl import summarize_leads, transform
from tests.reference.instants import to_instant
from tests.reference.leads import deal
from tests.reference.orders import Order
from tests.reference.settings import ReferenceSettings

SHOP = "00000000-0000-4000-8000-000000000001"
ZHANG = f"{SHOP}:张三"
LI = f"{SHOP}:李四"
ZHANG_ID = "fa55f60f-e32c-5a53-a54e-925cf73a97da"
ZHANG_LEAD_1 = "fd4ef8d1-2684-5631-8acd-3c839ea84862"
START = datetime(2026, 1, 1, 4, tzinfo=UTC)
ZERO = Decimal("0.00")

COUNTED: dict[str, pl.DataType] = {
    "customer_key": pl.String(),
    "order_id": pl.String(),
    "ordered_at": pl.Datetime("us", "UTC"),
    "wins": pl.Boolean(),
}
CLOSINGS: dict[str, pl.DataType] = {
    "customer_key": pl.String(),
    "lead_no": pl.Int32(),
    "closed_at": pl.Datetime("us", "UTC"),
}
ORDERS: dict[str, pl.DataType] = {
    "customer_key": pl.String(),
    "order_id": pl.String(),
    "system_order_type": pl.String(),
    "amount": pl.Decimal(14, 2),
    "ordered_at": pl.Datetime("us", "UTC"),
    "order_date": pl.Date(),
    "is_counted": pl.Boolean(),
    "is_completed": pl.Boolean(),
}
PEOPLE: dict[str, pl.DataType] = {
    "customer_key": pl.String(),
    "lead_no": pl.Int32(),
    "people_closed_at": pl.Datetime("us", "UTC"),
}
LEADS: dict[str, pl.DataType] = {
    "lead_id": pl.String(),
    "customer_global_id": pl.String(),
    "lead_no": pl.Int32(),
    "current_stage": pl.String(),
    "opened_at": pl.Datetime("us", "UTC"),
    "last_order_at": pl.Datetime("us", "UTC"),
    "closed_at": pl.Datetime("us", "UTC"),
    "closed_by": pl.String(),
    "sample_count": pl.Int32(),
    "proof_count": pl.Int32(),
    "bulk_count": pl.Int32(),
    "sample_amount": pl.Decimal(20, 2),
    "proof_amount": pl.Decimal(20, 2),
    "bulk_amount": pl.Decimal(20, 2),
}


def at(day: float) -> datetime:
    return START + timedelta(days=day)


# ---- 分到编号 --------------------------------------------------------------------


def dealt(
    orders: Sequence[tuple[str, float, bool]], closings: Sequence[tuple[str, int, float]] = ()
) -> dict[str, list[tuple[int, float]]]:
    """订单（客户、第几天、是否大货完成）与关闭（客户、编号、第几天）→ 每个客户按先后的（编号，第几天）。"""
    frame = pl.DataFrame(
        [(customer, str(index), at(day), wins) for index, (customer, day, wins) in enumerate(orders)],
        schema=COUNTED,
        orient="row",
    )
    closed = pl.DataFrame(
        [(customer, number, at(day)) for customer, number, day in closings], schema=CLOSINGS, orient="row"
    )
    result = deal_orders(frame.sort("customer_key", "ordered_at", "order_id"), closed)
    assert result.schema == pl.Schema(COUNTED | {"lead_no": pl.Int32()})
    rows = result.sort("ordered_at", "order_id")
    days = [
        (row["customer_key"], (row["lead_no"], (row["ordered_at"] - START) / timedelta(days=1)))
        for row in rows.to_dicts()
    ]
    return {customer: [pair for owner, pair in days if owner == customer] for customer in {owner for owner, _ in days}}


def test_orders_join_the_open_lead_until_a_completed_bulk_order_wins_it() -> None:
    orders = [("a", 1, False), ("a", 2, True), ("a", 3, True), ("a", 4, False), ("a", 5, False)]
    assert dealt(orders) == {"a": [(1, 1), (1, 2), (2, 3), (3, 4), (3, 5)]}


def test_customers_are_numbered_apart() -> None:
    orders = [("a", 1, True), ("b", 1, False), ("b", 2, False), ("a", 2, False)]
    assert dealt(orders, [("b", 1, 1)]) == {"a": [(1, 1), (2, 2)], "b": [(1, 1), (2, 2)]}


def test_order_exactly_at_the_closing_belongs_to_the_closed_lead() -> None:
    microsecond = 1 / 86_400_000_000
    orders = [("a", 1, False), ("a", 2, False), ("a", 2 + microsecond, False)]
    assert [number for number, _ in dealt(orders, [("a", 1, 2)])["a"]] == [1, 1, 2]


def test_completed_bulk_order_does_not_end_a_lead_that_a_person_closed() -> None:
    orders = [("a", 1, True), ("a", 2, True), ("a", 3, False), ("a", 4, False)]
    assert dealt(orders, [("a", 1, 3)]) == {"a": [(1, 1), (1, 2), (1, 3), (2, 4)]}


def test_closed_lead_may_be_empty_and_keeps_its_number() -> None:
    assert dealt([("a", 5, False)], [("a", 1, 2)]) == {"a": [(2, 5)]}
    assert dealt([("a", 5, False)], [("a", 1, 2), ("a", 2, 3), ("a", 3, 4)]) == {"a": [(4, 5)]}


def test_several_closings_cut_one_after_the_other() -> None:
    orders = [("a", 1, False), ("a", 3, True), ("a", 4, False), ("a", 6, True), ("a", 8, False)]
    assert dealt(orders, [("a", 1, 2), ("a", 3, 7)]) == {"a": [(1, 1), (2, 3), (3, 4), (3, 6), (4, 8)]}


def test_closing_on_a_later_number_does_not_cut_an_earlier_lead() -> None:
    orders = [("a", 1, False), ("a", 5, False), ("a", 9, True), ("a", 10, False)]
    assert dealt(orders, [("a", 2, 3)]) == {"a": [(1, 1), (1, 5), (1, 9), (3, 10)]}


def test_closing_beyond_every_lead_changes_nothing() -> None:
    orders = [("a", 1, True), ("a", 2, False)]
    assert dealt(orders, [("a", 9, 0)]) == {"a": [(1, 1), (2, 2)]}


def test_nothing_is_dealt_from_nothing() -> None:
    assert dealt([], [("a", 1, 2)]) == {}


def test_rows_are_not_gone_through_once_per_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """一个客户关闭了一百次，别人没有：经手的行数与关闭一次时差不多。"""
    orders = [("a", day, False) for day in range(1000)] + [("b", day, True) for day in range(1000)]
    handled = 0

    def counted(name: str) -> Any:
        original = getattr(pl.DataFrame, name)

        def call(frame: pl.DataFrame, *arguments: Any, **options: Any) -> Any:
            nonlocal handled
            handled += frame.height
            return original(frame, *arguments, **options)

        return call

    for name in ("with_columns", "filter", "join", "select"):
        monkeypatch.setattr(pl.DataFrame, name, counted(name))
    dealt(orders, [("a", 1, 500)])
    once, handled = handled, 0
    dealt(orders, [("a", number, number * 5) for number in range(1, 101)])
    in_between, handled = handled, 0
    dealt(orders, [("a", number, -1) for number in range(1, 101)])
    assert max(in_between, handled) < 2 * once


MOMENTS = st.integers(0, 6)
HISTORIES = st.lists(st.tuples(st.sampled_from("ab"), MOMENTS, st.booleans()), max_size=12)
CLOSING_SETS = st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(1, 4)), MOMENTS, max_size=5)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(history=HISTORIES, closings=CLOSING_SETS)
def test_dealing_in_rounds_equals_dealing_one_by_one(
    history: list[tuple[str, int, bool]], closings: dict[tuple[str, int], int]
) -> None:
    found = dealt(history, [(customer, number, day) for (customer, number), day in closings.items()])
    expected = {customer: reference(customer, history, closings) for customer, _, _ in history}
    assert found == expected


def reference(
    customer: str, history: list[tuple[str, int, bool]], closings: Mapping[tuple[str, int], int]
) -> list[tuple[int, float]]:
    """参照实现逐单发给的（编号，第几天）；同一时刻的先后按出现的次序，与 `dealt` 的订单号一致。"""
    orders = [
        reference_order(index, day, wins) for index, (owner, day, wins) in enumerate(history) if owner == customer
    ]
    closed = {number: to_instant(at(day)) for (owner, number), day in closings.items() if owner == customer}
    leads = deal(sorted(orders, key=lambda order: order.sequence), closed, ReferenceSettings())
    pairs = [(number, order) for number, lead in leads.items() for order in lead.orders]
    return [
        (number, float((order.ordered_at - to_instant(START)) / 86_400))
        for number, order in sorted(pairs, key=lambda pair: pair[1].sequence)
    ]


def reference_order(index: int, day: int, wins: bool) -> Order:
    return Order(
        shop_id=UUID(SHOP),
        order_id=str(index),
        customer_nickname="张三",
        latest_status="completed" if wins else "new",
        raw_order_type=None,
        system_order_type="BULK",
        amount=ZERO,
        quantity=1,
        ordered_at=to_instant(at(day)),
        order_date=at(day).date(),
        import_id=UUID(SHOP),
        raw_id=index,
    )


# ---- 商机的列 --------------------------------------------------------------------


def order(day: float, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "customer_key": ZHANG,
        "order_id": f"A-{day}",
        "system_order_type": "BULK",
        "amount": Decimal("10.00"),
        "ordered_at": at(day),
        "order_date": at(day).date(),
        "is_counted": True,
        "is_completed": False,
    }
    return row | changes


def lead(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lead_id": ZHANG_LEAD_1,
        "customer_global_id": ZHANG_ID,
        "lead_no": 1,
        "current_stage": "OPEN",
        "opened_at": None,
        "last_order_at": None,
        "closed_at": None,
        "closed_by": None,
        "sample_count": 0,
        "proof_count": 0,
        "bulk_count": 0,
        "sample_amount": ZERO,
        "proof_amount": ZERO,
        "bulk_amount": ZERO,
    }
    return row | changes


def transformed(
    *orders: dict[str, Any],
    people: Sequence[tuple[str, int, datetime | None]] = (),
    last_warm: date | None = date(2026, 1, 1),
) -> pl.DataFrame:
    customers = pl.DataFrame(
        {"customer_key": [ZHANG, LI], "customer_global_id": [ZHANG_ID, "11111111-1111-4111-8111-111111111111"]}
    )
    touched = pl.DataFrame(list(people), schema=PEOPLE, orient="row")
    return transform(summarize_leads(pl.DataFrame(list(orders), schema=ORDERS), touched), customers, touched, last_warm)


def assert_leads(result: pl.DataFrame, *leads: dict[str, Any]) -> None:
    """只放过 Decimal 的精度：写入时由目标列定。"""
    assert_frame_equal(result, pl.DataFrame(list(leads), schema=LEADS), check_row_order=False, check_dtypes=False)


def test_open_lead_sums_its_own_counted_orders() -> None:
    result = transformed(
        order(1, system_order_type="SAMPLE", is_completed=True),
        order(2, is_counted=False, is_completed=False),
        order(3, system_order_type="PROOF", amount=Decimal("-2.50")),
    )
    expected = lead(
        opened_at=at(1),
        last_order_at=at(3),
        sample_count=1,
        sample_amount=Decimal("10.00"),
        proof_count=1,
        proof_amount=Decimal("-2.50"),
    )
    assert_leads(result, expected)


def test_completed_bulk_order_wins_the_lead_at_its_own_moment() -> None:
    result = transformed(
        order(1, system_order_type="SAMPLE"), order(2, is_completed=True), order(3, is_completed=False)
    )
    won = lead(
        current_stage="WON",
        opened_at=at(1),
        last_order_at=at(2),
        closed_at=at(2),
        closed_by="etl",
        sample_count=1,
        sample_amount=Decimal("10.00"),
        bulk_count=1,
        bulk_amount=Decimal("10.00"),
    )
    assert_leads(result.filter(pl.col("lead_no") == 1), won)
    assert result.sort("lead_no")["current_stage"].to_list() == ["WON", "OPEN"]


@pytest.mark.parametrize(("days_before_newest", "stage"), [(90, "OPEN"), (91, "COLD")])
def test_lead_is_cold_when_its_last_order_is_more_than_90_days_before_the_newest_day(
    days_before_newest: int, stage: str
) -> None:
    newest_day = at(1).date() + timedelta(days=days_before_newest)
    result = transformed(order(0), order(1), last_warm=newest_day - timedelta(days=90))
    assert result["current_stage"].to_list() == [stage]


def test_won_lead_is_never_cold() -> None:
    result = transformed(order(1, is_completed=True), last_warm=at(500).date())
    assert result["current_stage"].to_list() == ["WON"]


def test_closed_lead_keeps_its_orders_and_leaves_the_closing_to_the_person() -> None:
    """关闭的各列在写入时受保护；这里给的值只在人已经收回关闭时才写下。"""
    result = transformed(order(1, is_completed=True), order(2), order(4), people=[(ZHANG, 1, at(2))])
    closed = lead(opened_at=at(1), last_order_at=at(2), bulk_count=2, bulk_amount=Decimal("20.00"))
    assert_leads(result.filter(pl.col("lead_no") == 1), closed)
    assert result.sort("lead_no")["opened_at"].to_list() == [at(1), at(4)]


def test_touched_lead_without_orders_stays_with_zeros() -> None:
    assert_leads(transformed(people=[(ZHANG, 1, None)], last_warm=None), lead())


def test_closing_on_a_number_that_is_never_dealt_does_not_take_orders() -> None:
    result = transformed(order(1), people=[(ZHANG, 0, at(9)), (ZHANG, -3, at(9))])
    counts = {row["lead_no"]: row["bulk_count"] for row in result.to_dicts()}
    assert counts == {1: 1, 0: 0, -3: 0}


def test_customer_without_counted_orders_has_no_lead() -> None:
    assert_leads(transformed(order(1, is_counted=False)))
