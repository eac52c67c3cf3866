"""订单号相同的几行：没有说那是什么就不导入；说了，照值合成订单，或者当作版本。"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bridge.imports.files import encoding
from bridge.imports.reading import StatusCount
from bridge.imports.rules.errors import ProfileError
from bridge.imports.rules.profile import LineRule, Profile

from .import_lines import HEADER, line, read, refusal, write


def items(folder: Path, *rows: Sequence[str]) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    orders, report = read(write(folder, rows), "items")
    merged = {column.column: column.taken for column in report.merged}
    return orders.select("order_id", "order_status", "amount", "quantity").rows(), merged


def test_the_refusal_says_what_it_saw_and_the_three_ways_on(tmp_path: Path) -> None:
    path = write(tmp_path, [line("A", "x"), line("B", "x"), line("A", "y", amount="7", quantity="2"), line("C", "z")])
    assert refusal(path) == (
        "orders.csv: 1 of 3 order numbers comes in several lines that differ in more than their status; one line per item? "
        "Order 'A' is in rows 2, 4, the columns that differ are 'amount', 'quantity', 'item'; nothing was imported: "
        "say what its lines are\n"
        "  --lines-are-items    items of one order, to be made one: 'customer_name': the same on all lines of an order, taken once; "
        "'order_status': the same on all lines of an order, taken once; 'amount': summed over the lines of an order; "
        "'quantity': summed over the lines of an order; 'ordered_at': the same on all lines of an order, taken once\n"
        "  --profile FILE       the same, said column by column, for example:\n"
        "      [group]\n"
        '      by = ["order_id"]\n'
        "      [orders]\n"
        '      order_id = { column = "order_id" }\n'
        '      shop = { constant = "店" }\n'
        '      customer_name = { column = "customer_name" }\n'
        '      order_status = { column = "order_status" }\n'
        '      amount = { column = "amount", aggregate = "sum" }\n'
        '      quantity = { column = "quantity", aggregate = "sum" }\n'
        '      ordered_at = { column = "ordered_at" }\n'
        "  --newest-line-wins   versions of one order: the last line of each in the file is the order"
    )


def test_the_profile_that_the_refusal_shows_gives_what_the_option_gives(tmp_path: Path) -> None:
    path = write(tmp_path, [line("A", "x"), line("B", "x"), line("A", "y", amount="7", quantity="2")])
    shown = [text.strip() for text in refusal(path).splitlines() if text.startswith("      ")]
    orders, _ = read(path, profile=Profile.model_validate(tomllib.loads("\n".join(shown))))
    assert orders.equals(read(path, "items")[0])


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        pytest.param([line("A"), line("A")], False, id="the same"),
        pytest.param([line("A"), line("A", order_status="closed")], False, id="another status"),
        pytest.param([line("A"), line(" A ", order_status="closed")], False, id="white space is no part of the number"),
        pytest.param([line("A"), line("A", "y")], True, id="a column that is not used"),
        pytest.param([line("A"), line("A", amount="")], True, id="empty is different"),
        pytest.param([line("A"), line("\tA", "y")], True, id="white space hides no repetition"),
        pytest.param([line("A"), line("a", "y")], False, id="case is"),
        pytest.param([line(""), line("", "y"), line(" ", "z")], False, id="no number"),
        pytest.param([line("A"), *[line(f"B{n}") for n in range(50)], line("A", "y")], True, id="far apart"),
        pytest.param(
            [line("A"), *[line(f"B{n}") for n in range(50)], line("A", order_status="x")],
            False,
            id="versions far apart",
        ),
    ],
)
def test_lines_that_differ_in_more_than_status_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, rows: list[tuple[str, ...]], refused: bool
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path, rows)
    if refused:
        assert "come" in refusal(path).partition("order number")[2]
    else:
        assert read(path)[0].height == len(rows)


def test_the_same_number_in_two_shops_is_two_orders(tmp_path: Path) -> None:
    rows = [(*line("A"), "东店"), (*line("A", "y"), "西店")]
    orders, report = read(write(tmp_path, rows, (*HEADER, "shop")), shop=None)
    assert (orders.height, report.orders, report.repeated_orders) == (2, 2, 0)
    rows.append((*line("A", "z", amount="7"), "东店"))
    orders, _ = read(write(tmp_path, rows, (*HEADER, "shop")), "items", shop=None)
    assert orders.select("order_id", "shop", "amount").rows() == [("A", "东店", Decimal(12)), ("A", "西店", Decimal(5))]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_numbers_that_only_share_a_hash_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("bridge.imports.orders.lines._hash", lambda rows: rows.hash_rows() % 3)
    rows = [line(f"A{n}", f"item {n}") for n in range(60)]
    assert read(write(tmp_path, rows))[0].height == 60
    assert "Order 'A7' is in rows 9, 62, " in refusal(write(tmp_path, [*rows, line("A7", "other")]))


def test_rows_that_are_set_aside_are_no_versions(tmp_path: Path) -> None:
    path = write(tmp_path, [line("A"), line("A", "y", amount="x"), line("B")])
    assert read(path, skip_bad_rows=True)[0]["order_id"].to_list() == ["A", "B"]
    path = write(tmp_path, [line("A"), line("A"), line("A", "y", amount="x"), line("B")])
    assert read(path, skip_bad_rows=True)[0]["order_id"].to_list() == ["A", "A", "B"]


def test_the_newest_line_wins_if_it_is_said(tmp_path: Path) -> None:
    orders, report = read(write(tmp_path, [line("A"), line("A", amount="7"), line("B")]), "newest-wins")
    assert orders.select("order_id", "amount").rows() == [("A", Decimal(5)), ("A", Decimal(7)), ("B", Decimal(5))]
    assert (report.orders, report.repeated_orders, report.rows) == (2, 1, 3)


def test_numbers_that_a_spreadsheet_rounded_are_not_taken_for_lines(tmp_path: Path) -> None:
    rows = [line("692001100000000000", str(n)) for n in range(5)] + [line("692001100000010000", "z")]
    assert "a spreadsheet has rounded" in refusal(write(tmp_path, rows))


def test_what_is_the_same_on_all_lines_is_the_orders(tmp_path: Path) -> None:
    orders, merged = items(tmp_path, *[line(order, item, amount="30") for order in "AB" for item in "xyz"])
    assert orders == [("A", "done", Decimal(30), 3), ("B", "done", Decimal(30), 3)]
    assert merged["amount"] == (
        'the same on all lines of an order (2 orders), taken once; if they are items of one price, say aggregate = "sum" in a profile'
    )
    # 三行的订单不会总共只有一件
    assert merged["quantity"] == "summed over the lines of an order (there are fewer than lines on each)"


def test_one_order_whose_lines_differ_makes_the_column_the_items(tmp_path: Path) -> None:
    orders, merged = items(
        tmp_path, line("A"), line("A", "y"), line("B", amount="1"), line("B", "y", amount="2"), line("C", amount="9")
    )
    assert [order[2] for order in orders] == [Decimal(10), Decimal(3), Decimal(9)]
    assert merged["amount"] == "summed over the lines of an order"


def test_what_only_one_line_has_is_taken_from_it(tmp_path: Path) -> None:
    empty = {"amount": "", "customer_name": "", "order_status": ""}
    orders, merged = items(
        tmp_path, line("A", amount="30"), line("A", "y", **empty), line("B", amount="8"), line("B", "z", **empty)
    )
    assert orders == [("A", "done", Decimal(30), 2), ("B", "done", Decimal(8), 2)]
    assert {merged[name] for name in empty} == {"on one line of an order only, taken once"}


def test_a_file_with_a_line_per_order_has_nothing_to_say(tmp_path: Path) -> None:
    orders, merged = items(tmp_path, line("A"), line(""), line("", "y"), line("B"))
    assert ([order[0] for order in orders], merged) == (["A", None, None, "B"], {})


@pytest.mark.parametrize(
    ("statuses", "status", "amount"),
    [
        (("done", "done"), "done", 11),
        (("done", "shipped"), "shipped", 11),
        (("shipped", "done", "waiting"), "shipped", 111),
        (("closed", "done"), "done", 10),
        (("done", "closed", "shipped"), "shipped", 101),
        (("已退款", "closed"), "已退款", 11),
        (("closed", " CLOSED "), "closed", 11),
        (("", "done"), "done", 11),
    ],
)
def test_an_order_is_cancelled_if_all_lines_are_and_done_if_the_others_are(
    tmp_path: Path, statuses: tuple[str, ...], status: str, amount: int
) -> None:
    rows = [line("A", str(n), order_status=text, amount=str(10**n)) for n, text in enumerate(statuses)]
    mixed = [line("B", "x"), line("B", "y", amount="6", order_status="shipped")]
    orders, merged = items(tmp_path, *rows, *mixed)
    assert orders[0][1:3] == (status, Decimal(amount))
    left_out = "; cancelled lines of orders that go on (1) are in no sum"
    assert merged["order_status"].endswith(left_out) == (amount in (10, 101))


@pytest.mark.parametrize(("name", "other"), [("customer_name", "李"), ("order_type", "打样")])
def test_lines_that_name_two_customers_or_types_are_no_order(tmp_path: Path, name: str, other: str) -> None:
    header = (*HEADER, "order_type")
    rows = [(*line("A"), "大货"), (*line("A", "y"), "大货"), (*line("A", "z"), "大货")]
    rows[2] = tuple(other if column == name else value for column, value in zip(header, rows[2], strict=True))
    path = write(tmp_path, rows, header)
    first = "张" if name == "customer_name" else "大货"
    assert (
        f"orders.csv, row 2, column '{name}': '{first}' is the {name} in one line of order 'A', and '{other}' in row 4"
        in refusal(path, lines="items")
    )
    assert (
        f"; but '{first}' is the {name} in one line of order 'A', and '{other}' in row 4: an order has one, so the"
        in refusal(path)
    )


def test_an_orders_time_is_its_first_lines(tmp_path: Path) -> None:
    orders, report = read(
        write(tmp_path, [line("A", ordered_at="2026-03-05"), line("A", "y", ordered_at="2026-03-04")]), "items"
    )
    assert orders["ordered_at"].dt.day().to_list() == [4]
    assert report.merged[-1].taken == "differs between the lines of an order, the earliest taken"


def test_a_bad_line_takes_its_order_along_and_is_no_evidence(tmp_path: Path) -> None:
    rows = [
        line("A"),
        line("A", "y", amount="x"),
        line("B"),
        line("B", "y"),
        line("C"),
        line("C", "y"),
        line("D"),
        line("D", "y"),
    ]
    orders, report = read(write(tmp_path, rows), "items", skip_bad_rows=True)
    assert orders.select("order_id", "amount").rows() == [(name, Decimal(5)) for name in "BCD"]
    assert report.merged[2].taken == "the same on all lines of an order (3 orders), taken once"


def profile(**tables: Any) -> Profile:
    orders: dict[str, Any] = {name: {"column": name} for name in HEADER if name != "item"}
    return Profile.model_validate({**tables, "orders": {**orders, **tables.get("orders", {})}})


def test_a_profile_says_it_and_says_more_where_the_values_mislead(tmp_path: Path) -> None:
    path = write(tmp_path, [line("A"), line("A", "y"), line("B")])
    told = profile(file={"lines": "items"}, orders={"amount": {"column": "amount", "aggregate": "sum"}})
    orders, report = read(path, profile=told)
    assert orders["amount"].to_list() == [Decimal(10), Decimal(5)]
    assert report.merged[2].taken == "sum of the lines of an order, as the profile says"
    assert read(path, profile=profile(file={"lines": "newest-wins"}))[0].height == 3


@pytest.mark.parametrize(
    ("tables", "lines", "problem"),
    [
        (
            {"group": {"by": ["order_id"]}},
            "items",
            r"--lines-are-items \(lines under \[file\]\) and \[group\] both say",
        ),
        (
            {"group": {"by": ["order_id"]}},
            "newest-wins",
            r"--newest-line-wins \(lines under \[file\]\) and \[group\] both say",
        ),
        ({"keep_extra": True}, "items", "keep_extra cannot be used with"),
        (
            {"orders": {"order_id": {"aggregate_expression": "MIN(item)"}}, "file": {"lines": "items"}},
            "items",
            "needs a column for order_id",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, tables: dict[str, Any], lines: LineRule, problem: str
) -> None:
    with pytest.raises(ProfileError, match=problem):
        read(write(tmp_path, [line("A")]), lines, profile(**tables))


def test_a_group_that_is_finer_than_the_order_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [line("A", "x"), line("B", "x"), line("A", "y", amount="7")])
    said = refusal(path, profile=profile(group={"by": ["order_id", "item"]}))
    assert said.startswith("orders.csv: [group] leaves order 'A' in several rows, they begin in 2, 4: ")
    assert (
        read(write(tmp_path, [line("A", "x"), line("A", "y")]), profile=profile(group={"by": ["order_id"]}))[0].height
        == 1
    )


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    states = ["done", "Closed", "Closed", "", "shipped", "done", "done"]
    rows = [line(f"A{n}", amount=f"{n}.5", order_status=status) for n, status in enumerate(states)]
    report = read(write(tmp_path, rows))[1]
    assert report.rejected == {}
    assert (report.orders, report.repeated_orders, report.amount) == (7, 0, Decimal("24.5"))
    assert report.statuses == [
        StatusCount("done", 3, "completed"),
        StatusCount("Closed", 2, "cancelled"),
        StatusCount("shipped", 1, "order"),
        StatusCount(None, 1, "order"),
    ]


def test_what_the_etl_will_reject_is_counted_by_its_rules(tmp_path: Path) -> None:
    rows = [
        line("A"),
        line("", customer_name=""),
        line(" "),
        line("B", customer_name="\u3000"),
        line("C", ordered_at=""),
        line("D", quantity="-1"),
        line("E" * 501),
    ]
    report = read(write(tmp_path, rows))[1]
    assert report.rejected == {
        "missing_order_id": 2,
        "missing_customer_name": 1,
        "missing_ordered_at": 1,
        "negative_quantity": 1,
        "text_too_long": 1,
    }
    assert read(write(tmp_path, [line("A")]), shop=" ")[1].rejected == {"missing_shop": 1}


def test_a_difference_far_behind_identical_lines_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 64)
    monkeypatch.setattr("bridge.imports.orders.lines._SAMPLE_ROWS", 3)
    rows = [row for _ in range(20) for row in (line("A"), line("B"))]
    assert read(write(tmp_path, rows))[1].repeated_orders == 2
    assert "Order 'B' is in rows 3, 42, the columns that differ are 'amount'; " in refusal(
        write(tmp_path, [*rows, line("B", amount="6")])
    )
