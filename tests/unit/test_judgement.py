"""逐行评判：十条拒收规则、它们的先后与边界。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from etl_assets.core.text import WHITE_SPACE
from etl_assets.services.raw_rows import judge

SCHEMA: dict[str, pl.DataType] = {
    "raw_id": pl.Int64(),
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
SHOP_ID = "00000000-0000-4000-8000-000000000001"
SHOPS = pl.DataFrame({"shop": ["旗舰店", "二店"], "shop_id": [SHOP_ID, "00000000-0000-4000-8000-000000000002"]})
VALID: dict[str, Any] = {
    "raw_id": 1,
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
# DOMAIN 第 3 节的次序；每一项是 SQL 给出的、恰好犯这一条的值
BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("missing_order_id", {"order_id": None}),
    ("missing_shop", {"shop": None}),
    ("unknown_shop", {"shop": "没有这家"}),
    ("missing_customer_name", {"customer_name": None}),
    ("missing_ordered_at", {"ordered_at": None, "day": None, "time_rule": "missing_ordered_at"}),
    ("bad_ordered_at", {"ordered_at": None, "day": None, "time_rule": "bad_ordered_at"}),
    ("outside_partitions", {"ordered_at": None, "day": date(1999, 12, 31), "time_rule": "outside_partitions"}),
    ("bad_amount", {"amount": None, "amount_rule": "bad_amount"}),
    ("negative_quantity", {"quantity": -1}),
    ("text_too_long", {"order_id": "x" * 501, "customer_name": "张" * 501}),
]


def rows(*changes: dict[str, Any]) -> pl.DataFrame:
    """一行一处改动。"""
    return pl.DataFrame([VALID | change for change in changes], schema=SCHEMA)


def rules(*changes: dict[str, Any]) -> list[str | None]:
    return judge(rows(*changes), SHOPS)["rule"].to_list()


def test_valid_row_keeps_its_values_and_gets_no_rule() -> None:
    expected = (
        rows({}).drop("amount_rule", "time_rule").with_columns(shop_id=pl.lit(SHOP_ID), rule=pl.lit(None, pl.String))
    )
    assert_frame_equal(judge(rows({}), SHOPS), expected)


def test_text_is_trimmed_and_an_empty_text_is_missing() -> None:
    untrimmed = {
        "order_id": f"{WHITE_SPACE} A 1 {WHITE_SPACE}",
        "customer_name": "\u3000张 三\x85",
        "order_type": "\t \u2003",
        "order_status": "",
        "shop": f" 旗舰店{WHITE_SPACE}",
    }
    trimmed = {"order_id": "A 1", "customer_name": "张 三", "order_type": None, "order_status": None}
    expected = (
        rows(trimmed)
        .drop("amount_rule", "time_rule")
        .with_columns(shop_id=pl.lit(SHOP_ID), rule=pl.lit(None, pl.String))
    )
    assert_frame_equal(judge(rows(untrimmed), SHOPS), expected)


@pytest.mark.parametrize(("rule", "change"), BROKEN, ids=[rule for rule, _ in BROKEN])
def test_row_that_breaks_one_rule_is_rejected_by_it(rule: str, change: dict[str, Any]) -> None:
    assert rules(change, {}) == [rule, None]


def test_first_rule_that_hits_names_the_row() -> None:
    """第 i 行犯第 i 条及其后的每一条：只报第 i 条。"""
    changes: list[dict[str, Any]] = []
    for _, change in reversed(BROKEN):
        changes.insert(0, (changes[0] if changes else {}) | change)
    assert rules(*changes) == [rule for rule, _ in BROKEN]


@pytest.mark.parametrize("blank", ["", " ", WHITE_SPACE])
def test_blank_texts_are_missing(blank: str) -> None:
    changes: list[dict[str, Any]] = [{"order_id": blank}, {"shop": blank}, {"customer_name": blank}]
    assert rules(*changes) == ["missing_order_id", "missing_shop", "missing_customer_name"]


@pytest.mark.parametrize("column", ["order_id", "customer_name"])
def test_500_characters_after_trimming_are_allowed_and_501_are_not(column: str) -> None:
    assert rules({column: f"  {'张' * 500}\u3000"}, {column: "张" * 501}) == [None, "text_too_long"]


def test_refunds_zero_and_missing_numbers_are_legal() -> None:
    assert rules({"amount": Decimal("-0.01")}, {"amount": None}, {"quantity": 0}, {"quantity": None}) == [None] * 4
