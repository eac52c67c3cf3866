"""订单的变换：补缺省值、换算类型、选赢家；整帧比较。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
from polars.testing import assert_frame_equal

from etl_assets.core.business_day import DayRange
from etl_assets.orders.transform import References, TransformedRows, transform
from etl_assets.orders.winners import pick_repeated, pick_winners

SHOP = "00000000-0000-4000-8000-000000000001"
OTHER_SHOP = "00000000-0000-4000-8000-000000000002"
IMPORT = "10000000-0000-4000-8000-000000000001"
DAYS = DayRange(date(2026, 1, 5), date(2026, 1, 6))

RAW: dict[str, pl.DataType] = {
    "raw_id": pl.Int64(),
    "import_id": pl.String(),
    "order_id": pl.String(),
    "shop": pl.String(),
    "customer_name": pl.String(),
    "order_type": pl.String(),
    "order_status": pl.String(),
    "amount": pl.Decimal(14, 2),
    "amount_rule": pl.String(),
    "quantity": pl.Int32(),
    "ordered_at": pl.Datetime("us", "UTC"),
    "day": pl.Date(),
    "time_rule": pl.String(),
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
    "is_unmapped": pl.Boolean(),
    "customer_key": pl.String(),
}
VERSIONS = {"shop_id": pl.String(), "order_id": pl.String(), "import_rank": pl.Int32(), "raw_id": pl.Int64()}
REJECTED: dict[str, pl.DataType] = {
    "raw_id": pl.Int64(),
    "import_id": pl.String(),
    "day": pl.Date(),
    "rule": pl.String(),
}
REFERENCES = References(
    shops=pl.DataFrame({"shop": ["旗舰店", "二店"], "shop_id": [SHOP, OTHER_SHOP]}),
    type_mappings=pl.DataFrame(
        [("打样", "SAMPLE"), ("产前样", "PROOF"), ("大货", "BULK")],
        schema={"raw_order_type": pl.String(), "system_order_type": pl.String()},
        orient="row",
    ),
)


def raw(raw_id: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "raw_id": raw_id,
        "import_id": IMPORT,
        "order_id": "A-1",
        "shop": "旗舰店",
        "customer_name": "张三",
        "order_type": "大货",
        "order_status": "completed",
        "amount": Decimal("10.00"),
        "amount_rule": None,
        "quantity": 2,
        "ordered_at": datetime(2026, 1, 5, 4, tzinfo=UTC),
        "day": date(2026, 1, 5),
        "time_rule": None,
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
        "is_unmapped": False,
        "customer_key": f"{SHOP}:张三",
    }
    return row | changes


def transformed(*rows: dict[str, Any]) -> TransformedRows:
    return transform(pl.DataFrame(list(rows), schema=RAW), REFERENCES, DAYS)


def assert_versions(result: TransformedRows, *versions: dict[str, Any]) -> None:
    """只放过数字的宽度：写入时由目标列定。"""
    assert_frame_equal(
        result.versions, pl.DataFrame(list(versions), schema=ORDERS), check_row_order=False, check_dtypes=False
    )


def assert_rejected(result: TransformedRows, *rejected: tuple[int, date, str]) -> None:
    rows = [(raw_id, IMPORT, day, rule) for raw_id, day, rule in rejected]
    assert_frame_equal(result.rejected, pl.DataFrame(rows, schema=REJECTED, orient="row"), check_row_order=False)


def winners(*versions: tuple[str, str, int, int]) -> list[int]:
    """:param versions: shop_id、order_id、import_rank、raw_id。"""
    return sorted(pick_winners(pl.DataFrame(list(versions), schema=VERSIONS, orient="row"))["raw_id"])


def test_version_takes_the_values_of_its_row() -> None:
    assert_versions(transformed(raw(7)), order(7))


def test_missing_values_get_their_defaults() -> None:
    missing = raw(7, order_type=None, order_status=None, amount=None, quantity=None)
    expected = order(7, latest_status="unknown", raw_order_type=None, amount=Decimal("0.00"), quantity=1)
    assert_versions(transformed(missing), expected)


def test_types_are_mapped_exactly_and_all_others_are_bulk() -> None:
    types = ["打样", "产前样", "大货", "没有映射", None]
    mapped = ["SAMPLE", "PROOF", "BULK", "BULK", "BULK"]
    rows = [raw(number, order_id=str(number), order_type=kind) for number, kind in enumerate(types)]
    expected = [
        order(
            number, order_id=str(number), raw_order_type=kind, system_order_type=system, is_unmapped=kind == "没有映射"
        )
        for number, (kind, system) in enumerate(zip(types, mapped, strict=True))
    ]
    assert_versions(transformed(*rows), *expected)


def test_customer_key_is_normalized_and_the_nickname_is_not() -> None:
    expected = order(7, customer_nickname="ＡＢ　 Ｃ", customer_key=f"{SHOP}:AB C")
    assert_versions(transformed(raw(7, customer_name=" ＡＢ　 Ｃ ")), expected)


def test_rejected_row_is_no_version_and_is_listed_with_its_rule() -> None:
    result = transformed(raw(1), raw(2, quantity=-1))
    assert_versions(result, order(1))
    assert_rejected(result, (2, date(2026, 1, 5), "negative_quantity"))


def test_version_outside_the_range_counts_but_rejected_rows_outside_belong_to_other_days() -> None:
    elsewhere = {"ordered_at": datetime(2026, 1, 9, 4, tzinfo=UTC), "day": date(2026, 1, 9)}
    result = transformed(
        raw(2, **elsewhere), raw(3, shop="没有这家", **elsewhere), raw(4, day=None, time_rule="bad_ordered_at")
    )
    assert_versions(result, order(2, ordered_at=elsewhere["ordered_at"], order_date=elsewhere["day"]))
    assert_rejected(result)


def test_no_rows_give_no_versions() -> None:
    result = transformed()
    assert_versions(result)
    assert_rejected(result)


def test_version_of_the_newest_import_wins_whatever_its_raw_id() -> None:
    assert winners((SHOP, "A", 3, 1), (SHOP, "A", 2, 9), (SHOP, "A", 1, 10)) == [1]


def test_among_imports_of_the_same_moment_the_highest_raw_id_wins() -> None:
    assert winners((SHOP, "A", 2, 3), (SHOP, "A", 2, 8), (SHOP, "A", 2, 5), (SHOP, "A", 1, 9)) == [8]


def test_same_order_id_in_two_shops_is_two_orders() -> None:
    assert winners((SHOP, "A", 1, 1), (OTHER_SHOP, "A", 1, 2)) == [1, 2]


def test_rows_of_one_order_in_one_import_are_repeated_but_for_the_last() -> None:
    versions = [
        *((SHOP, "A", "1", raw_id) for raw_id in (3, 1, 2)),
        (SHOP, "A", "2", 4),
        (OTHER_SHOP, "A", "1", 5),
        *((SHOP, "B", "2", raw_id) for raw_id in (7, 6)),
    ]
    schema = {"shop_id": pl.String(), "order_id": pl.String(), "import_id": pl.Categorical(), "raw_id": pl.Int64()}
    assert sorted(pick_repeated(pl.DataFrame(versions, schema=schema, orient="row"))["raw_id"]) == [1, 2, 6]


def test_order_ids_that_differ_in_case_are_two_orders() -> None:
    assert winners((SHOP, "a", 1, 1), (SHOP, "A", 1, 2)) == [1, 2]
