"""客户的变换：全部历史汇总成一行；整帧比较。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
from polars.testing import assert_frame_equal

from etl_assets.customers.etl import transform, transform_orderless

SHOP = "00000000-0000-4000-8000-000000000001"
ZHANG = f"{SHOP}:张三"
LI = f"{SHOP}:李四"
ZHANG_ID = "fa55f60f-e32c-5a53-a54e-925cf73a97da"
LEGACY_ID = "11111111-1111-4111-8111-111111111111"

ORDERS: dict[str, pl.DataType] = {
    "customer_key": pl.String(),
    "order_id": pl.String(),
    "customer_nickname": pl.String(),
    "latest_status": pl.String(),
    "system_order_type": pl.String(),
    "amount": pl.Decimal(14, 2),
    "ordered_at": pl.Datetime("us", "UTC"),
    "order_date": pl.Date(),
    "is_counted": pl.Boolean(),
    "is_completed": pl.Boolean(),
}
CUSTOMERS: dict[str, pl.DataType] = {
    "customer_global_id": pl.String(),
    "customer_key": pl.String(),
    "shop_id": pl.String(),
    "customer_nickname": pl.String(),
    "first_order_at": pl.Datetime("us", "UTC"),
    "last_order_at": pl.Datetime("us", "UTC"),
    "order_count": pl.Int32(),
    "total_amount": pl.Decimal(20, 2),
    "sample_count": pl.Int32(),
    "proof_count": pl.Int32(),
    "bulk_count": pl.Int32(),
    "sample_amount": pl.Decimal(20, 2),
    "proof_amount": pl.Decimal(20, 2),
    "bulk_amount": pl.Decimal(20, 2),
}
ZERO = Decimal("0.00")


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, tzinfo=UTC)


def order(day: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "customer_key": ZHANG,
        "order_id": f"A-{day}",
        "customer_nickname": "张三",
        "latest_status": "completed",
        "system_order_type": "BULK",
        "amount": Decimal("10.00"),
        "ordered_at": at(day),
        "order_date": date(2026, 1, day),
        "is_counted": True,
        "is_completed": True,
    }
    return row | changes


def customer(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "customer_global_id": ZHANG_ID,
        "customer_key": ZHANG,
        "shop_id": SHOP,
        "customer_nickname": "张三",
        "first_order_at": None,
        "last_order_at": None,
        "order_count": 0,
        "total_amount": ZERO,
        "sample_count": 0,
        "proof_count": 0,
        "bulk_count": 0,
        "sample_amount": ZERO,
        "proof_amount": ZERO,
        "bulk_amount": ZERO,
    }
    return row | changes


def assert_customers(result: pl.DataFrame, *customers: dict[str, Any]) -> None:
    """只放过 Decimal 的精度：写入时由目标列定。"""
    assert_frame_equal(
        result, pl.DataFrame(list(customers), schema=CUSTOMERS), check_row_order=False, check_dtypes=False
    )


def known(**ids: str) -> pl.DataFrame:
    keys = {"zhang": ZHANG, "li": LI}
    rows = [(keys[name], customer_id, True) for name, customer_id in ids.items()]
    return pl.DataFrame(
        rows, schema={"customer_key": pl.String, "customer_global_id": pl.String, "is_known": pl.Boolean}, orient="row"
    )


def transformed(*orders: dict[str, Any], **ids: str) -> pl.DataFrame:
    return transform(pl.DataFrame(list(orders), schema=ORDERS), known(**(ids or {"zhang": ZHANG_ID})))


def test_orders_are_counted_and_summed_by_type() -> None:
    result = transformed(
        order(1, system_order_type="SAMPLE", amount=Decimal("1.10")),
        order(2, system_order_type="PROOF", amount=Decimal("2.20")),
        order(3, system_order_type="BULK", amount=Decimal("300.00")),
        order(4, system_order_type="BULK", amount=Decimal("-0.05")),
    )
    expected = customer(
        first_order_at=at(1),
        last_order_at=at(4),
        order_count=4,
        total_amount=Decimal("303.25"),
        sample_count=1,
        proof_count=1,
        bulk_count=2,
        sample_amount=Decimal("1.10"),
        proof_amount=Decimal("2.20"),
        bulk_amount=Decimal("299.95"),
    )
    assert_customers(result, expected)


def test_cancelled_orders_give_no_figures_but_the_newest_order_gives_the_nickname() -> None:
    result = transformed(
        order(1, is_counted=False, amount=Decimal("99.00")),
        order(2, customer_nickname="张三 "),
        order(3, is_counted=False, customer_nickname="張三"),
    )
    expected = customer(
        customer_nickname="張三",
        first_order_at=at(2),
        last_order_at=at(2),
        order_count=1,
        total_amount=Decimal("10.00"),
        bulk_count=1,
        bulk_amount=Decimal("10.00"),
    )
    assert_customers(result, expected)


def test_nickname_of_two_orders_at_one_moment_is_that_of_the_higher_order_id() -> None:
    """帧已按 (ordered_at, order_id) 排好。"""
    tied = [
        order(1, order_id=order_id, customer_nickname=order_id, is_counted=False) for order_id in ("A-10", "A-9", "a")
    ]
    assert_customers(transformed(*tied), customer(customer_nickname="a"))


def test_customer_whose_orders_are_all_cancelled_keeps_zeros_and_no_times() -> None:
    result = transformed(order(1, is_counted=False), order(2, is_counted=False))
    assert_customers(result, customer())


def test_sum_may_exceed_what_one_order_can_hold() -> None:
    most = Decimal("999999999999.99")
    result = transformed(*[order(day, amount=most) for day in (1, 2, 3)])
    assert result["total_amount"].to_list() == [most * 3]
    assert result["bulk_amount"].to_list() == [most * 3]


def test_each_customer_has_one_row_and_an_existing_id_is_kept() -> None:
    result = transformed(
        order(1, is_counted=False),
        order(1, customer_key=LI, customer_nickname="李四", is_counted=False),
        zhang=ZHANG_ID,
        li=LEGACY_ID,
    )
    assert_customers(
        result, customer(), customer(customer_key=LI, customer_global_id=LEGACY_ID, customer_nickname="李四")
    )


def test_customer_without_orders_is_not_transformed_here() -> None:
    assert_customers(transformed())


def test_customer_that_stays_without_orders_is_named_after_its_key() -> None:
    result = transform_orderless(known(zhang=LEGACY_ID))
    assert_customers(result, customer(customer_global_id=LEGACY_ID))


def test_name_part_of_a_key_may_itself_hold_a_colon() -> None:
    key = f"{SHOP}:a:b: c"
    result = transform_orderless(
        pl.DataFrame({"customer_key": [key], "customer_global_id": [LEGACY_ID], "is_known": [True]})
    )
    assert_customers(result, customer(customer_key=key, customer_global_id=LEGACY_ID, customer_nickname="a:b: c"))
