"""一行一件商品的文件：商品行合成订单，坏了一行就整单不导入。"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest

from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBlock, OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.reading import Reading
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import Profile

HEADER = "invoice,who,when,price,count,note\n"
ORDERS: dict[str, dict[str, object]] = {
    "order_id": {"column": "invoice"},
    "shop": {"constant": "店"},
    "customer_name": {"column": "who"},
    "amount": {"expression": "price * count", "aggregate": "sum", "round": True},
    "quantity": {"column": "count", "aggregate": "sum"},
    "ordered_at": {"column": "when", "aggregate": "min"},
}


def profile(**targets: Mapping[str, object]) -> Profile:
    return Profile.model_validate(
        {"file": {"numbers": ["price", "count"]}, "group": {"by": ["invoice"]}, "orders": ORDERS | targets}
    )


def build(folder: Path, rows: str, **targets: Mapping[str, object]) -> OrderBlock:
    path = folder / "items.csv"
    path.write_text(HEADER + rows, encoding="utf-8")
    used = profile(**targets)
    source = open_source(path, used.file)
    return OrderBuilder(source, map_columns(source, used, overrides={}, shop=None), "UTC").build(next(source.blocks))


def test_lines_of_one_order_become_one_row_in_the_order_of_the_file(tmp_path: Path) -> None:
    built = build(
        tmp_path, "B,,2024-01-06,0.015,1,\nA,张,2024-01-05,2,3,\nB,李,2024-01-05,0.01,2,\nB,王,2024-01-07,,1,\n"
    )
    assert built.problems.is_empty()
    rows = [
        (row["row_number"], row["order_id"], row["customer_name"], row["amount"], row["quantity"])
        for row in built.orders.to_dicts()
    ]
    # 第一个非空的客户；0.015 + 0.02 + 空 = 0.035，远离零进位
    assert rows == [(2, "B", "李", Decimal("0.04"), 4), (3, "A", "张", Decimal("6.00"), 3)]
    assert built.orders["ordered_at"].dt.day().to_list() == [5, 5]


def test_every_aggregation_leaves_out_missing_values(tmp_path: Path) -> None:
    rows = "A,,2024-01-01,1,,b\nA,张,2024-01-03,1,,a\nA,,2024-01-02,1,,c\n"
    found = {
        (how, name): build(tmp_path, rows, **{name: {"column": column, "aggregate": how}}).orders[name].to_list()[0]
        for how in ("first", "last", "min", "max")
        for name, column in (("customer_name", "who"), ("order_status", "note"))
    }
    assert {key: value for key, value in found.items() if key[1] == "customer_name"} == dict.fromkeys(
        [(how, "customer_name") for how in ("first", "last", "min", "max")], "张"
    )
    assert [found[how, "order_status"] for how in ("first", "last", "min", "max")] == ["b", "c", "a", "c"]
    assert build(tmp_path, rows).orders["quantity"].to_list() == [None]


def test_an_aggregate_expression_sees_all_lines_of_the_order(tmp_path: Path) -> None:
    status: dict[str, object] = {
        "aggregate_expression": "CASE WHEN MIN(note) = 'ok' AND MAX(note) = 'ok' THEN 'completed' ELSE 'open' END"
    }
    amount: dict[str, object] = {"aggregate_expression": "SUM(price * count) + 10"}
    built = build(
        tmp_path,
        "A,张,2024-01-05,1,1,ok\nB,李,2024-01-05,2,1,ok\nB,李,2024-01-05,2,1,no\n",
        order_status=status,
        amount=amount,
    )
    assert built.orders.select("order_status", "amount").rows() == [
        ("completed", Decimal("11.00")),
        ("open", Decimal("14.00")),
    ]


def test_an_aggregate_expression_must_give_one_value(tmp_path: Path) -> None:
    with pytest.raises(
        ImportFileError, match="the aggregate_expression of order_status gives several values per order"
    ):
        build(tmp_path, "A,张,2024-01-05,1,1,ok\n", order_status={"aggregate_expression": "UPPER(note)"})


def test_lines_without_a_key_are_orders_of_their_own(tmp_path: Path) -> None:
    built = build(tmp_path, ",张,2024-01-05,1,1,\n,张,2024-01-05,1,1,\nA,张,2024-01-05,1,1,\n")
    assert built.orders.select("row_number", "order_id").rows() == [(2, None), (3, None), (4, "A")]


def test_a_bad_line_takes_its_whole_order_along(tmp_path: Path) -> None:
    built = build(tmp_path, "A,张,2024-01-05,1,1,\nB,李,2024-01-05,1,1,\nA,张,2024-01-05,x,1,\nA,张,2024-02-30,1,1,\n")
    assert built.orders["order_id"].to_list() == ["B"]
    assert built.problems.rows() == [
        (2, "", "belongs to the same order as the bad row 4", None),
        (4, "price", "is not a number with at most 12 digits before and 6 after the point", "x"),
        (5, "when", "is not a possible date and time such as 2024-01-31 08:05:00 in UTC", "2024-02-30"),
    ]


def test_the_message_names_the_bad_line_and_not_its_companions(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text(HEADER, encoding="utf-8")
    built = build(tmp_path, "A,张,2024-01-05,1,1,\nA,张,2024-01-05,x,1,\n")
    with BadRows(path, write=False) as bad_rows:
        bad_rows.add(built.problems, built.orders)
    assert "items.csv, row 3, column 'price': 'x' is not a number" in str(bad_rows.error())
    assert bad_rows.error().more_bad_rows == 1


def test_a_total_too_large_rejects_the_order_with_all_its_lines(tmp_path: Path) -> None:
    built = build(tmp_path, "A,张,2024-01-05,1,2000000000,\nB,李,2024-01-05,1,1,\nA,张,2024-01-05,1,2000000000,\n")
    assert built.orders["order_id"].to_list() == ["B"]
    assert built.problems.rows() == [
        (2, "count", "is too large for integer", "4000000000"),
        (4, "", "belongs to the same order as the bad row 2", None),
    ]


def test_lines_of_one_order_may_be_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.imports.files.encoding.BLOCK_BYTES", 64)
    path = tmp_path / "items.csv"
    path.write_text(
        HEADER + "A,张,2024-01-05,1,1,\n" + "B,李,2024-01-05,1,1,\n" * 50 + "A,张,2024-01-05,1,1,\n", encoding="utf-8"
    )
    used = profile()
    source = open_source(path, used.file)
    builder = OrderBuilder(source, map_columns(source, used, overrides={}, shop=None), "UTC")
    with BadRows(path, write=False) as bad_rows:
        reading = Reading(builder, bad_rows, skip_bad_rows=False, on_progress=None)
        orders = [order for frame in reading.orders() for order in frame.select("order_id", "quantity").rows()]
    assert orders == [("A", 2), ("B", 50)]
    assert (reading.report.rows, reading.report.source_rows) == (2, 52)


def test_blanks_around_a_cell_mean_nothing_to_an_expression(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text(
        HEADER
        + "A\t,张\t,2024-01-05\t,1\t,1\t,ok\t\nA\t,张\t,2024-01-05\t,2\t,1\t,\tclosed \nB,\t,2024-01-05,3,1,\t\n",
        encoding="utf-8",
    )
    orders = ORDERS | {
        "customer_name": {"expression": "COALESCE(who, invoice)"},
        "order_status": {"expression": "CASE WHEN note = 'ok' THEN 'done' WHEN note IS NULL THEN 'none' ELSE note END"},
    }
    used = Profile.model_validate(
        {
            "file": {"numbers": ["price", "count"]},
            "group": {"by": ["invoice"], "leave_out": "note = 'closed'"},
            "orders": orders,
        }
    )
    source = open_source(path, used.file)
    built = OrderBuilder(source, map_columns(source, used, overrides={}, shop=None), "UTC").build(next(source.blocks))
    assert built.orders.select("customer_name", "order_status", "amount").rows() == [
        ("张", "done", Decimal("1.00")),
        ("B", "none", Decimal("3.00")),
    ]


@pytest.mark.parametrize("column", ["amount", "quantity"])
def test_a_total_that_differs_between_the_lines_of_an_order_is_not_guessed(tmp_path: Path, column: str) -> None:
    rows = (
        "A,张,2024-01-05,2,1,\nA,张,2024-01-05,2,1,\nB,李,2024-01-05,,7,\nB,李,2024-01-05,10,,\nB,李,2024-01-05,14,9,\n"
    )
    target = {"amount": "price", "quantity": "count"}[column]
    with pytest.raises(ImportFileError) as caught:
        build(tmp_path, rows, **{column: {"column": target}})
    row, value, first = {"amount": (6, 14, "10 in row 5"), "quantity": (6, 9, "7 in row 4")}[column]
    assert f"row {row}, column '{target}': '{value}' differs from {first} of the same order" in str(caught.value)
    build(tmp_path, rows, **{column: {"column": target, "aggregate": "first"}})
