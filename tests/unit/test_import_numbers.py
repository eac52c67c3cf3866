"""数的写法由整列定：一种写法的文件读回来一分不差，看不出的要人说，从不悄悄差一千倍。"""

from __future__ import annotations

import zipfile
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.imports.files import encoding
from bridge.imports.orders.conventions import GivenConventions
from bridge.imports.rules.errors import ColumnReading, ImportFileError, SeenCell
from bridge.imports.rules.numbers import DecimalMark
from bridge.imports.rules.profile import Profile

from .import_columns import ROW, read_column, read_file, refusal, write_column

COMMA, POINT = GivenConventions(decimal="comma"), GivenConventions(decimal="point")
EXAMPLES = max(200, settings.default.max_examples)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4.711,98 €", "4711.98"),
        ("1 234,50", "1234.50"),
        ("1\u00a0234,50", "1234.50"),
        ("1\u202f234,50 €", "1234.50"),
        ("1\u2009234,50", "1234.50"),
        ("-2,5", "-2.50"),
        ("\u22122,50\u00a0€", "-2.50"),
        ("R$ 1.234,50", "1234.50"),
        ("1,234.50", "1234.50"),
        ("1'234.50", "1234.50"),
        ("1\u2019234.50", "1234.50"),
        ("(12.00)", "-12.00"),
        ("($1,234.50)", "-1234.50"),
        ("12.00-", "-12.00"),
        ("¥12.00", "12.00"),
        ("￥12.00", "12.00"),
        ("¥ -12.00", "-12.00"),
        ("-￥12.00", "-12.00"),
        ("12.00元", "12.00"),
        ("12.00 元", "12.00"),
        ("CN¥12.00", "12.00"),
        ("US$1,234.50", "1234.50"),
        ("USD 12.00", "12.00"),
        ("12.00 EUR", "12.00"),
        ("\uff11\uff12\uff0e\uff15", "12.50"),
        ("\uff11\uff0c\uff12\uff13\uff14\uff0e\uff15\uff10", "1234.50"),
        ("1.2万", "12000.00"),
        ("1.23456万元", "12345.60"),
        ("0.01亿", "1000000.00"),
        ("0.125万", "1250.00"),
        (".5万", "5000.00"),
    ],
)
def test_every_notation_is_read_for_what_it_means(tmp_path: Path, text: str, amount: str) -> None:
    assert read_column(tmp_path, "amount", [text]) == [Decimal(amount)]


@pytest.mark.parametrize(
    ("text", "point", "comma"),
    [
        ("85.500", "85.50", "85500.00"),
        ("1,230", "1230.00", "1.23"),
        ("-1.230 €", "-1.23", "-1230.00"),
        ("1.200万", "12000.00", "12000000.00"),
    ],
)
def test_a_value_that_can_be_two_numbers_is_asked_about(tmp_path: Path, text: str, point: str, comma: str) -> None:
    said = refusal(tmp_path, "amount", ["12", text, "7"])
    assert said is not None
    assert said.startswith(f"orders.csv, row 3, column 'amount': '{text}' is ")
    assert (
        "no value of the column tells which it has; nothing was imported: say --decimal-point or --decimal-comma"
        in said
    )
    assert read_column(tmp_path, "amount", ["12", text], given=POINT)[1] == Decimal(point)
    assert read_column(tmp_path, "amount", ["12", text], given=COMMA)[1] == Decimal(comma)
    assert read_column(tmp_path, "amount", ["12.5", text])[1] == Decimal(point)
    assert read_column(tmp_path, "amount", [text, "12,5"])[0] == Decimal(comma)


def test_the_profile_may_say_it(tmp_path: Path) -> None:
    orders = {name: {"column": name} for name in ROW}
    profile = Profile.model_validate({"file": {"decimal": "comma"}, "orders": orders})
    assert read_column(tmp_path, "amount", ["85.500"], profile=profile) == [Decimal(85500)]
    assert read_column(tmp_path, "amount", ["85.500"], profile=profile, given=POINT) == [Decimal("85.5")]


@pytest.mark.parametrize(
    ("values", "last"), [(["12.50", "12,50"], "12,50"), (["1.234.567", "1", "1,234,567"], "1,234,567")]
)
def test_a_column_in_two_conventions_is_refused(tmp_path: Path, values: list[str], last: str) -> None:
    said = refusal(tmp_path, "amount", values)
    assert said is not None
    assert said.startswith(f"orders.csv, row {len(values) + 1}, column 'amount': '{last}' has a decimal ")
    assert f"{values[0]!r} in row 2 a decimal" in said
    said = refusal(tmp_path, "amount", values, given=POINT)
    assert said is not None
    assert "is not a number" in said


@pytest.mark.parametrize(
    "text",
    [
        "0,12,3",
        "1,23.4",
        "12,34.5",
        "1.23.4",
        "1 23",
        "1,234,5",
        "--1",
        "(-1)",
        "(1",
        "1-2",
        "1e5",
        "一千",
        "€",
        "1 €2",
        "12,5-3",
    ],
)
def test_what_is_no_number_in_any_convention_is_a_bad_row(tmp_path: Path, text: str) -> None:
    for option in (GivenConventions(), POINT, COMMA):
        said = refusal(tmp_path, "amount", [text], given=option)
        assert said is not None
        assert "is not a number" in said


def test_each_column_has_its_own_convention(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    cells = [("A1", "85.500,00", "1,000.0"), ("A2", "1,5", "2,000")]
    rows = [
        {**ROW, "order_id": order_id, "amount": amount, "quantity": quantity} for order_id, amount, quantity in cells
    ]
    path.write_text("\n".join("|".join(row) for row in (ROW, *(row.values() for row in rows))), encoding="utf-8")
    orders, readings = read_file(path)
    assert orders.select("amount", "quantity").rows() == [(Decimal(85500), 1000), (Decimal("1.5"), 2000)]
    assert readings == [
        ColumnReading("amount", "numbers with a decimal comma", SeenCell(2, "85.500,00")),
        ColumnReading("quantity", "numbers with a decimal point", SeenCell(2, "1,000.0")),
    ]


@pytest.mark.parametrize(("decides", "amount"), [("7,5", Decimal(85500)), ("7.5", Decimal("85.5"))])
def test_a_value_far_behind_decides_for_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decides: str, amount: Decimal
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 512)
    values = ["85.500", *["3"] * 200, decides, *["4"] * 50]
    assert read_column(tmp_path, "amount", values)[0] == amount
    said = refusal(tmp_path, "amount", [*values, "1,5" if decides == "7.5" else "1.5"])
    assert said is not None
    assert said.startswith("orders.csv, row 254, column 'amount': ")


def test_a_value_far_behind_decides_in_an_archive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """再读一遍的还是压缩包里的那个文件；合计行不作证据。"""
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 512)
    text = (
        write_column(tmp_path, "amount", ["85.500", *["3"] * 200, "7,5"]).read_text(encoding="utf-8")
        + '合计,,,,"1,234.50"\n'
    )
    path = tmp_path / "orders.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("orders.csv", text)
    orders, readings = read_file(path)
    assert (orders["amount"][0], orders.height) == (Decimal(85500), 202)
    assert readings == [ColumnReading("amount", "numbers with a decimal comma", SeenCell(203, "7,5"))]


@pytest.mark.parametrize("bad", ["12.5,1,2024-01-05,x", "12.5,1"])
def test_a_row_with_fields_out_of_place_decides_nothing(tmp_path: Path, bad: str) -> None:
    path = write_column(tmp_path, "amount", ["85.500", "12.5"])
    path.write_text(path.read_text(encoding="utf-8").replace("12.5,1,2024-01-05", bad), encoding="utf-8")
    with pytest.raises(ImportFileError, match=r"row 2, column 'amount': '85\.500' is .*no value of the column tells"):
        read_file(path, skip_bad_rows=True)


def test_columns_of_expressions_have_conventions_too(tmp_path: Path) -> None:
    orders: dict[str, object] = {name: {"column": name} for name in ROW}
    orders["amount"] = {"expression": "amount * quantity"}
    profile = Profile.model_validate({"file": {"numbers": ["amount", "quantity"]}, "orders": orders})
    assert read_column(tmp_path, "amount", ["1.234,5 €", "85.500"], profile=profile) == [
        Decimal("1234.5"),
        Decimal(85500),
    ]
    said = refusal(tmp_path, "amount", ["85.500"], profile=profile)
    assert said is not None
    assert said.startswith("orders.csv, row 2, column 'amount': '85.500' is 85.500 with a decimal point")


def write_number(
    cents: int, decimals: int, decimal: str, group: str, currency: tuple[str, str], negative: tuple[str, str]
) -> str:
    """与产品无关的写法：逐位写出来。"""
    whole, fraction = divmod(abs(cents), 100)
    digits = str(whole)
    first = len(digits) % 3
    groups = [digits[:first], *(digits[at : at + 3] for at in range(first, len(digits), 3))]
    text = group.join(part for part in groups if part)
    if decimals or fraction:
        text += decimal + f"{fraction:02d}".ljust(decimals, "0")
    text = currency[0] + text + currency[1]
    return negative[0] + text + negative[1] if cents < 0 else text


@settings(max_examples=EXAMPLES)
@given(
    cents=st.lists(st.integers(-(10**13), 10**13) | st.integers(-(10**6), 10**6), min_size=1, max_size=6),
    decimals=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    mark=st.sampled_from(["point", "comma"]),
    group=st.sampled_from(["", "other", " ", "\u00a0", "\u202f", "'"]),
    currency=st.sampled_from([("", ""), ("¥", ""), ("", " €"), ("US$", ""), ("", "元"), ("R$ ", "")]),
    negative=st.sampled_from([("-", ""), ("(", ")"), ("", "-"), ("\u2212", "")]),
)
def test_amounts_in_one_convention_come_back_exactly_or_are_asked_about(
    tmp_path_factory: pytest.TempPathFactory,
    cents: list[int],
    decimals: list[int],
    mark: DecimalMark,
    group: str,
    currency: tuple[str, str],
    negative: tuple[str, str],
) -> None:
    point, other = (".", ",") if mark == "point" else (",", ".")
    separator = other if group == "other" else group
    values = [
        write_number(value, places, point, separator, currency, negative)
        for value, places in zip(cents, decimals, strict=False)
    ]
    expected = [Decimal(value) / 100 for value in cents]
    path = write_column(tmp_path_factory.mktemp("amounts"), "amount", values)
    said = refusal(path.parent, "amount", values)
    if said is None:
        assert read_file(path)[0]["amount"].to_list() == expected
    else:
        assert "no value of the column tells which it has" in said
    assert read_file(path, given=GivenConventions(decimal=mark))[0]["amount"].to_list() == expected


@pytest.mark.parametrize(
    ("first", "second"), [("$12.00", "€12.00"), ("12 USD", "12 EUR"), ("¥1", "£1"), ("US$1", "HK$1"), ("12元", "JPY 3")]
)
def test_two_currencies_in_one_column_are_not_summed(tmp_path: Path, first: str, second: str) -> None:
    assert f"{second!r} is another currency than {first!r} in row 2" in refusal(tmp_path, "amount", [first, second])


@pytest.mark.parametrize("values", [["¥12", "CN¥3", "4元", "5"], ["$1", "US$2", "USD 3"], ["￥12", "1200円"]])
def test_marks_of_one_currency_go_together(tmp_path: Path, values: list[str]) -> None:
    assert len(read_column(tmp_path, "amount", values)) == len(values)


def test_a_column_of_currencies_stops_the_import_unless_the_amount_follows_from_it(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    rows = [",".join([*ROW, "Currency"])]
    rows += [",".join([*{**ROW, "order_id": currency}.values(), currency]) for currency in ("SEK", "", "EUR")]
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(
        ImportFileError, match="row 4, column 'Currency': 'EUR' is another currency than 'SEK' in row 2"
    ):
        read_file(path)
    amount = {"expression": "CASE WHEN Currency = 'SEK' THEN '0.09' ELSE amount END"}
    columns = {name: {"column": name} for name in ROW if name != "amount"}
    profile = Profile.model_validate({"orders": {**columns, "amount": amount}})
    assert read_file(path, profile=profile)[0]["amount"].to_list() == [Decimal("0.09"), 1, 1]
