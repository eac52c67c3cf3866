"""比较的结果怎样写给人与程序看：什么字符都看得见、不成标记，差一行也不是 100 %。"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import pytest

from bridge.operations.compare_report import describe, render_html, show_pair, show_share, show_value, summarize
from etl_assets.comparison.comparing import (
    ColumnDifferences,
    Comparison,
    ComparisonRequest,
    Samples,
    TableComparison,
    ValueSample,
)

SHOP = UUID("00000000-0000-4000-8000-000000000001")
EQUAL = TableComparison(
    table="orders",
    rows_left=1_000_000,
    rows_right=1_000_000,
    missing=0,
    extra=0,
    differing=0,
    columns=[ColumnDifferences("amount", 0, None)],
    samples=Samples(),
)
ONE_CENT = replace(
    EQUAL,
    differing=1,
    columns=[ColumnDifferences("amount", 1, Decimal("0.01"))],
    samples=Samples(differing=[ValueSample({"shop_id": SHOP, "order_id": "A-1"}, "amount", "1.00", "1.01")]),
)


def comparison(*tables: TableComparison, left: str = "old", right: str = "new") -> Comparison:
    return Comparison(ComparisonRequest(left=left, right=right), datetime(2026, 7, 1, tzinfo=UTC), tables)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "NULL"),
        ("NULL", "'NULL'"),
        ("", "''"),
        (" a", "' a'"),
        ("a  b", "'a  b'"),
        ("a\u00a0b", r"'a\xa0b'"),
        ("\u202eabc", r"'\u202eabc'"),
        ("\x1b[31m", r"'\x1b[31m'"),
        ("张三 🎁 שלום", "张三 🎁 שלום"),
        ("-12.50", "-12.50"),
        (SHOP, str(SHOP)),
        (3, "3"),
    ],
)
def test_value_is_shown_without_hidden_characters(value: object, shown: str) -> None:
    assert show_value(value) == shown


def test_long_values_are_shown_around_their_difference() -> None:
    text = "x" * 1_000_000
    left, right = show_pair(f"{text}1{text}", f"{text}2{text}")
    assert left != right
    assert len(left) < 200
    assert left.startswith("…x")
    assert left.endswith("x…")


def test_long_value_whose_end_is_missing_shows_the_end() -> None:
    left, right = show_pair("x" * 500, "x" * 500 + "!")
    assert (left[-1], right[-1]) == ("x", "!")
    assert show_pair(None, "x" * 500)[0] == "NULL"


def test_one_row_of_ten_million_is_not_a_hundred_percent() -> None:
    assert show_share(EQUAL) == "100 %"
    assert show_share(ONE_CENT) == "99.9999 %"
    assert show_share(replace(ONE_CENT, rows_left=10_000_000, rows_right=10_000_000)) == "99.9999 %"


def test_share_counts_the_rows_of_both_sides() -> None:
    assert show_share(replace(EQUAL, rows_left=3, rows_right=3, missing=1, extra=1)) == "50 %"
    assert show_share(replace(EQUAL, rows_left=0, rows_right=0)) == "100 %"


def test_summary_names_the_tables_that_differ() -> None:
    assert summarize(comparison(EQUAL)) == "old and new are equal"
    assert (
        summarize(comparison(EQUAL, replace(ONE_CENT, table="leads")))
        == "old and new differ: leads in 1 of 1,000,000 rows"
    )


def test_summary_of_nothing_does_not_claim_equality() -> None:
    assert summarize(comparison(replace(EQUAL, rows_left=0, rows_right=0))) == "old and new have no rows to compare"


def test_json_says_which_row_and_what() -> None:
    described = json.loads(json.dumps(describe(comparison(ONE_CENT)), default=str))
    assert described["equal"] is False
    assert described["request"]["left"] == "old"
    assert described["tables"][0] == {
        "table": "orders",
        "equal": False,
        "equal_rows": 999_999,
        "equal_share": 0.999999,
        "rows_left": 1_000_000,
        "rows_right": 1_000_000,
        "missing": 0,
        "extra": 0,
        "differing": 1,
        "columns": [{"column": "amount", "differing": 1, "largest_difference": "0.01"}],
        "samples": {
            "missing": [],
            "extra": [],
            "differing": [
                {"key": {"shop_id": str(SHOP), "order_id": "A-1"}, "column": "amount", "left": "1.00", "right": "1.01"}
            ],
        },
    }


def test_html_escapes_everything_that_comes_from_the_data() -> None:
    nasty = "<script>alert('x')</script>&\"'"
    key = {"shop_id": SHOP, "order_id": nasty}
    table = replace(
        ONE_CENT, missing=1, extra=1, samples=Samples([key], [key], [ValueSample(key, "notes", nasty, None)])
    )
    page = render_html(comparison(table, left=nasty))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7  # 标题、h1、图例，三种样本的键，左值
    assert 'class="value null">NULL<' in page


def test_html_is_one_file_without_references() -> None:
    page = render_html(comparison(ONE_CENT))
    assert "old and new differ: orders in 1 of 1,000,000 rows" in page
    assert "99.9999 %" in page
    assert not any(word in page for word in ("http", "src=", "href=", "@import", "url("))
