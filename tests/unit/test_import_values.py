"""文字变成金额、数量与时刻：能读的一分不差，不能读的说出是哪一行哪一列。"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.rules.profile import FileFormat, Profile

ROW = {
    "order_id": "A1",
    "shop": "店",
    "customer_name": "张三",
    "order_status": "已完成",
    "amount": "1",
    "quantity": "1",
    "ordered_at": "2024-01-05",
}


def build(
    folder: Path, column: str, values: list[str], *, profile: Profile | None = None
) -> tuple[pl.DataFrame, list[tuple[int, str, str, str]]]:
    path = folder / "orders.csv"
    rows = ["|".join({**ROW, column: value}.values()) for value in values]
    path.write_text("\n".join(["|".join(ROW), *rows]), encoding="utf-8")
    source = open_source(path, FileFormat(separator="|"))
    builder = OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), "Asia/Shanghai")
    built = [builder.build(block) for block in source.blocks]
    problems = [problem for block in built for problem in block.problems.rows()]
    return pl.concat([block.orders for block in built]), problems


def profile(ordered_at: dict[str, str] | None = None, amount: dict[str, object] | None = None) -> Profile:
    columns: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    columns["ordered_at"] |= ordered_at or {}
    columns["amount"] |= amount or {}
    return Profile.model_validate({"orders": columns})


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("12.5", "12.50"),
        ("-0.01", "-0.01"),
        ("+7", "7.00"),
        (" 7. ", "7.00"),
        (".5", "0.50"),
        ("1,234.50", "1234.50"),
        ("¥1,234,567", "1234567.00"),
        ("￥-3.5", "-3.50"),
        ("-$3.5", "-3.50"),
        ("12.3400", "12.34"),
        ("999999999999.99", "999999999999.99"),
        ("-999999999999.99", "-999999999999.99"),
    ],
)
def test_amounts_are_exact(tmp_path: Path, text: str, amount: str) -> None:
    orders, problems = build(tmp_path, "amount", [text])
    assert problems == []
    assert orders["amount"].to_list() == [Decimal(amount)]
    assert orders["amount"].dtype == pl.Decimal(14, 2)


@pytest.mark.parametrize(
    ("column", "text", "problem"),
    [
        ("amount", "abc", "is not a number"),
        ("amount", "12,34.5", "is not a number"),
        ("amount", "1e5", "is not a number"),
        ("amount", "NaN", "is not a number"),
        ("amount", "--1", "is not a number"),
        ("amount", "1 2", "is not a number"),
        ("amount", "-", "is not a number"),
        ("amount", "0.345", "has more than 2 decimals"),
        ("amount", "1000000000000", "is too large for numeric(14,2)"),
        ("amount", "9" * 30, "is too large"),
        ("quantity", "1.5", "is not a whole number"),
        ("quantity", "2147483648", "is too large for integer"),
        ("quantity", "-2147483649", "is too large for integer"),
        ("quantity", "x", "is not a number"),
    ],
)
def test_what_is_no_number_of_the_table_is_a_bad_row(tmp_path: Path, column: str, text: str, problem: str) -> None:
    orders, problems = build(tmp_path, column, ["1", text, "2"])
    assert problems == [(3, column, problem, text)]
    assert orders["row_number"].to_list() == [2, 4]


def test_quantities_may_be_written_with_zero_decimals(tmp_path: Path) -> None:
    orders, problems = build(tmp_path, "quantity", ["3.00", "-2", "2147483647", "-2147483648"])
    assert problems == []
    assert orders["quantity"].to_list() == [3, -2, 2147483647, -2147483648]


def test_empty_cells_are_null_in_every_column(tmp_path: Path) -> None:
    for column in ROW:
        orders, problems = build(tmp_path, column, ["", "  "])
        assert problems == []
        blank = "  " if column in ("order_id", "shop", "customer_name", "order_status") else None
        assert orders[column].to_list() == [None, blank]


def test_text_stays_as_it_was_exported(tmp_path: Path) -> None:
    names = [" 张三\t", "'; DROP TABLE raw_orders; --", "${HOME} {} %s \\N \\."]
    assert build(tmp_path, "customer_name", names)[0]["customer_name"].to_list() == names


def test_amounts_are_rounded_half_away_from_zero_only_on_request(tmp_path: Path) -> None:
    orders, problems = build(
        tmp_path,
        "amount",
        ["0.005", "-0.005", "1.125", "2.675", "33.333333333333336"],
        profile=profile(amount={"round": True}),
    )
    assert problems == []
    assert orders["amount"].to_list() == [Decimal(text) for text in ("0.01", "-0.01", "1.13", "2.68", "33.33")]


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2024-01-05 08:05:06", datetime(2024, 1, 5, 0, 5, 6, tzinfo=UTC)),
        ("2024/1/5 8:05", datetime(2024, 1, 5, 0, 5, tzinfo=UTC)),
        (" 2024-01-05 ", datetime(2024, 1, 4, 16, tzinfo=UTC)),
        ("2024-01-05T08:05:06.123456", datetime(2024, 1, 5, 0, 5, 6, 123456, tzinfo=UTC)),
        ("2024-01-05T08:05:06Z", datetime(2024, 1, 5, 8, 5, 6, tzinfo=UTC)),
        ("2024-01-05 08:05:06.5+09:00", datetime(2024, 1, 4, 23, 5, 6, 500000, tzinfo=UTC)),
        ("2024-02-29 23:59", datetime(2024, 2, 29, 15, 59, tzinfo=UTC)),
        ("9999-12-31 23:59:59", datetime(9999, 12, 31, 15, 59, 59, tzinfo=UTC)),
    ],
)
def test_times_without_a_zone_are_local(tmp_path: Path, text: str, instant: datetime) -> None:
    # 前后夹着别的写法：一列里混着几种也行
    orders, problems = build(tmp_path, "ordered_at", ["2024-01-05 08:05:06", text, "2024-01-05"])
    assert problems == []
    assert orders["ordered_at"][1] == instant


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-30 10:00:00",
        "2023-02-29",
        "2024-13-01",
        "2024-01-05 24:00:00",
        "2024-01-05 08:05:60",
        "20240105",
        "now",
        "infinity",
        "10000-01-01",
    ],
)
def test_impossible_times_are_bad_rows(tmp_path: Path, text: str) -> None:
    _, problems = build(tmp_path, "ordered_at", ["2024-01-05", text])
    assert problems == [
        (3, "ordered_at", "is not a possible date and time such as 2024-01-31 08:05:00 in Asia/Shanghai", text)
    ]


def test_format_and_zone_of_the_profile_decide(tmp_path: Path) -> None:
    london = profile(ordered_at={"format": "%m-%d-%Y %H:%M", "time_zone": "Europe/London"})
    orders, problems = build(
        tmp_path,
        "ordered_at",
        ["07-01-2010 08:26", "10-31-2010 02:30", "13-01-2010 08:26", "03-28-2010 01:30"],
        profile=london,
    )
    assert orders["ordered_at"].to_list() == [
        datetime(2010, 7, 1, 7, 26, tzinfo=UTC),
        datetime(2010, 10, 31, 2, 30, tzinfo=UTC),
    ]
    assert [(row, value) for row, _, _, value in problems] == [(4, "13-01-2010 08:26"), (5, "03-28-2010 01:30")]


def test_digits_run_together_must_all_be_there(tmp_path: Path) -> None:
    orders, problems = build(
        tmp_path, "ordered_at", ["19970101", "1997011", "19970230"], profile=profile(ordered_at={"format": "%Y%m%d"})
    )
    assert orders["ordered_at"].to_list() == [datetime(1996, 12, 31, 16, tzinfo=UTC)]
    assert [row for row, *_ in problems] == [3, 4]


def test_only_the_first_problem_of_a_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(",".join(ROW) + "\nA1,店,张三,已完成,x,y,z\n", encoding="utf-8")
    source = open_source(path, FileFormat())
    built = OrderBuilder(source, map_columns(source, None, overrides={}, shop=None), "UTC").build(next(source.blocks))
    assert built.problems.rows() == [(2, "amount", "is not a number", "x")]
    assert built.orders.is_empty()
