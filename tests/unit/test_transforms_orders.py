"""订单的变换：选赢家、补缺省值、换算类型；整帧比较。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
from polars.testing import assert_frame_equal

from etl_assets.core.business_day import DayRange
from etl_assets.orders.etl import TransformedOrders, transform

SHOP = "00000000-0000-4000-8000-000000000001"
OTHER_SHOP = "00000000-0000-4000-8000-000000000002"
IMPORT = "10000000-0000-4000-8000-000000000001"
DAYS = DayRange(date(2026, 1, 5), date(2026, 1, 6))

JUDGED: dict[str, pl.DataType] = {
    "raw_id": pl.Int64(),
    "import_id": pl.String(),
    "import_rank": pl.Int32(),
    "shop_id": pl.String(),
    "order_id": pl.String(),
    "customer_name": pl.String(),
    "order_type": pl.String(),
    "order_status": pl.String(),
    "amount": pl.Decimal(14, 2),
    "quantity": pl.Int32(),
    "ordered_at": pl.Datetime("us", "UTC"),
    "day": pl.Date(),
    "in_partitions": pl.Boolean(),
    "rule": pl.String(),
}
ORDERS: dict[str, pl.DataType] = {
    "shop_id": pl.String(),
    "order_id": pl.String(),
    "customer_nickname": pl.String(),
    "latest_status": pl.String(),
    "raw_order_type": pl.String(),
    "system_order_type": pl.String(),
    "amount": pl.Decimal(14, 2),
    "quantity": pl.Int32(),
    "ordered_at": pl.Datetime("us", "UTC"),
    "order_date": pl.Date(),
    "import_id": pl.String(),
    "raw_id": pl.Int64(),
}
REJECTED: dict[str, pl.DataType] = {"raw_id": pl.Int64(), "import_id": pl.String(), "day": pl.Date(), "rule": pl.String()}
MAPPINGS = pl.DataFrame(
    [("打样", "SAMPLE"), ("产前样", "PROOF"), ("大货", "BULK"), ("定金", "DEPOSIT"), ("空", None)],
    schema={"raw_order_type": pl.String(), "system_order_type": pl.String()},
    orient="row",
)


def version(raw_id: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "raw_id": raw_id,
        "import_id": IMPORT,
        "import_rank": 1,
        "shop_id": SHOP,
        "order_id": "A-1",
        "customer_name": "张三",
        "order_type": "大货",
        "order_status": "completed",
        "amount": Decimal("10.00"),
        "quantity": 2,
        "ordered_at": datetime(2026, 1, 5, 4, tzinfo=UTC),
        "day": date(2026, 1, 5),
        "in_partitions": True,
        "rule": None,
    }
    return row | changes


def order(raw_id: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "shop_id": SHOP,
        "order_id": "A-1",
        "customer_nickname": "张三",
        "latest_status": "completed",
        "raw_order_type": "大货",
        "system_order_type": "BULK",
        "amount": Decimal("10.00"),
        "quantity": 2,
        "ordered_at": datetime(2026, 1, 5, 4, tzinfo=UTC),
        "order_date": date(2026, 1, 5),
        "import_id": IMPORT,
        "raw_id": raw_id,
    }
    return row | changes


def transformed(*versions: dict[str, Any]) -> TransformedOrders:
    return transform(pl.DataFrame(list(versions), schema=JUDGED), MAPPINGS, DAYS)


def assert_orders(result: TransformedOrders, *orders: dict[str, Any]) -> None:
    """只放过 Decimal 的精度：写入时由目标列定。"""
    assert_frame_equal(result.orders, pl.DataFrame(list(orders), schema=ORDERS), check_row_order=False, check_dtypes=False)


def assert_rejected(result: TransformedOrders, *rejected: tuple[int, date, str]) -> None:
    rows = [(raw_id, IMPORT, day, rule) for raw_id, day, rule in rejected]
    assert_frame_equal(result.rejected, pl.DataFrame(rows, schema=REJECTED, orient="row"), check_row_order=False)


def test_order_takes_the_values_of_its_only_version() -> None:
    assert_orders(transformed(version(7)), order(7))


def test_missing_values_get_their_defaults() -> None:
    missing = version(7, order_type=None, order_status=None, amount=None, quantity=None)
    expected = order(7, latest_status="unknown", raw_order_type=None, amount=Decimal("0.00"), quantity=1)
    assert_orders(transformed(missing), expected)


def test_types_are_mapped_exactly_and_all_others_are_bulk() -> None:
    types = ["打样", "产前样", "大货", "定金", "空", "没有映射", None]
    mapped = ["SAMPLE", "PROOF", "BULK", "BULK", "BULK", "BULK", "BULK"]
    versions = [version(number, order_id=str(number), order_type=kind) for number, kind in enumerate(types)]
    expected = [
        order(number, order_id=str(number), raw_order_type=kind, system_order_type=system)
        for number, (kind, system) in enumerate(zip(types, mapped, strict=True))
    ]
    assert_orders(transformed(*versions), *expected)


def test_version_of_the_newest_import_wins_whatever_its_raw_id() -> None:
    result = transformed(version(1, import_rank=3, amount=Decimal("3.00")), version(9, import_rank=2), version(10, import_rank=1))
    assert_orders(result, order(1, amount=Decimal("3.00")))


def test_among_imports_of_the_same_moment_the_highest_raw_id_wins() -> None:
    result = transformed(version(3, import_rank=2), version(8, import_rank=2, quantity=8), version(5, import_rank=2), version(9))
    assert_orders(result, order(8, quantity=8))


def test_rejected_version_never_wins_and_is_listed_with_its_rule() -> None:
    result = transformed(version(1), version(2, import_rank=2, quantity=-1, rule="negative_quantity"))
    assert_orders(result, order(1))
    assert_rejected(result, (2, date(2026, 1, 5), "negative_quantity"))


def test_order_whose_versions_are_all_rejected_does_not_exist() -> None:
    result = transformed(version(1, rule="bad_amount"))
    assert_orders(result)
    assert_rejected(result, (1, date(2026, 1, 5), "bad_amount"))


def test_winner_outside_the_range_is_written_but_rejected_rows_outside_belong_to_other_days() -> None:
    elsewhere = {"ordered_at": datetime(2026, 1, 9, 4, tzinfo=UTC), "day": date(2026, 1, 9)}
    result = transformed(
        version(1), version(2, import_rank=2, **elsewhere), version(3, rule="unknown_shop", **elsewhere), version(4, day=None, rule="x")
    )
    assert_orders(result, order(2, ordered_at=elsewhere["ordered_at"], order_date=elsewhere["day"]))
    assert_rejected(result)


def test_same_order_id_in_two_shops_is_two_orders() -> None:
    result = transformed(version(1), version(2, shop_id=OTHER_SHOP))
    assert_orders(result, order(1), order(2, shop_id=OTHER_SHOP))


def test_order_ids_that_differ_in_case_are_two_orders() -> None:
    result = transformed(version(1, order_id="a"), version(2, order_id="A"))
    assert_orders(result, order(1, order_id="a"), order(2, order_id="A"))


def test_no_versions_give_no_orders() -> None:
    result = transformed()
    assert_orders(result)
    assert_rejected(result)
