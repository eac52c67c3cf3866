"""表格软件弄丢了的单元格一律是坏行，说出丢了什么、怎样找回来；为了不丢而加的保护去掉。"""

from __future__ import annotations

import re
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge.imports.orders.conventions import GivenConventions
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import Profile

from . import test_import_spreadsheet
from .import_columns import ROW, read_column, read_file, refusal
from .test_import_spreadsheet import DATE, Cell, cell_xml, write_workbook

SAVE_AS_TEXT = "export again, or format the column as text before saving"


class Xml(NamedTuple):
    """照写的单元格；@ 是它的位置。"""

    text: str


@pytest.fixture(autouse=True)
def raw_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(place: str, cell: Cell | Xml) -> str:
        return cell.text.replace("@", place) if isinstance(cell, Xml) else cell_xml(place, cell)

    monkeypatch.setattr("tests.unit.test_import_spreadsheet.cell_xml", write)


def workbook(folder: Path, column: str, cells: list[Cell | Xml], *, left: int = 0) -> Path:
    header: list[Cell | Xml] = [*ROW, "备注"]
    lines = [
        [{**ROW, "order_id": f"A{number}", "备注": "", column: cell}[name] for name in (*ROW, "备注")]
        for number, cell in enumerate(cells, 1)
    ]
    rows = [[None] * left + [*line] for line in (header, *lines)]
    return write_workbook(folder / "orders.xlsx", 单=rows)  # type: ignore[arg-type]  # 照写的单元格只有这里有


def refused(path: Path) -> str:
    with pytest.raises(ImportFileError) as caught:
        read_file(path)
    return str(caught.value)


def test_a_date_cell_is_no_id(tmp_path: Path) -> None:
    """3-12 那样的号码，表格软件当作日期；写成文字的日期照旧。"""
    path = workbook(tmp_path, "order_id", ["2026-03-12", (46093, DATE)])
    assert refused(path) == (
        "orders.xlsx, row 3, column 'order_id': '2026-03-12' is a date: a spreadsheet may have made it out of the number; "
        f"nothing was imported: {SAVE_AS_TEXT}, or import the other rows with --skip-bad-rows"
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("'交易关闭", "交易关闭"),
        ("'13800138000", "13800138000"),
        ("'t Hart", "'t Hart"),
        ("'; --", "'; --"),
        ("'引'号'", "'引'号'"),
        ("'", "'"),
    ],
)
@pytest.mark.parametrize("column", ["order_status", "customer_name", "shop"])
def test_an_apostrophe_that_means_text_is_no_part_of_it(tmp_path: Path, column: str, text: str, meant: str) -> None:
    assert read_column(tmp_path, column, [text]) == [meant]


@pytest.mark.parametrize("text", ["2.51236E+18", "2.51236e+18", "2,51236E+18", "6.9E+17", " 1.38E+10", "2.51236E18"])
@pytest.mark.parametrize("column", ["order_id", "customer_name"])
def test_a_number_in_scientific_notation_is_no_id(tmp_path: Path, column: str, text: str) -> None:
    said = refusal(tmp_path, column, ["A1", text, "A2", text])
    assert said == (
        f"orders.csv, row 3, column '{column}': {text!r} is a longer number that a spreadsheet has rounded: its last digits are lost "
        f"(rows 3, 5) (1 more bad row); nothing was imported: {SAVE_AS_TEXT}, or import the other rows with --skip-bad-rows"
    )


@pytest.mark.parametrize("text", ["1E+", "E+5", "12E10", "3E12", "LE+1", "A1.5E+3", "v1.5E3", "1.0"])
def test_ids_that_only_look_like_it_are_ids(tmp_path: Path, text: str) -> None:
    assert read_column(tmp_path, "order_id", [text]) == [text]


@pytest.mark.parametrize("column", ["order_id", "customer_name"])
def test_a_number_that_a_program_made_a_decimal_is_no_id(tmp_path: Path, column: str) -> None:
    said = refusal(tmp_path, column, ["A1", "1001.0"])
    assert said is not None
    assert said.startswith(
        f"orders.csv, row 3, column '{column}': '1001.0' is a number that a program has made a decimal;"
    )


def test_long_ids_that_all_end_in_zeros_were_rounded(tmp_path: Path) -> None:
    rounded = ["2512360000000010000", "2512360000000020000", "2512360000000030000"]
    assert refusal(tmp_path, "order_id", ["A1", *rounded]) == (
        "orders.csv, row 3, column 'order_id': '2512360000000010000' is a longer number that a spreadsheet has rounded: its last digits "
        f"are lost, as in 3 of the 3 long ids of the column (rows 3, 4, 5); nothing was imported: {SAVE_AS_TEXT}"
    )
    kept = ["2512360000000010000", "2512360000000012345", "2512360000000017001"]
    assert read_column(tmp_path, "order_id", kept) == kept
    # 一个号码碰巧以 0 结尾不说明什么
    assert read_column(tmp_path, "order_id", ["1234567890123450"]) == ["1234567890123450"]


@pytest.mark.parametrize(
    "text", ["#N/A", "#####", "########", "#REF!", "#NAME?", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!"]
)
@pytest.mark.parametrize("column", [*ROW])
def test_an_error_value_is_no_value_of_any_column(tmp_path: Path, column: str, text: str) -> None:
    said = refusal(tmp_path, column, [ROW[column], text])
    assert said == (
        f"orders.csv, row 3, column '{column}': '{text}' is an error value of a spreadsheet, the value is lost; nothing was imported: "
        "export again, or widen the column and mend its formulas before saving, or import the other rows with --skip-bad-rows"
    )


def test_names_may_begin_with_a_hash(tmp_path: Path) -> None:
    assert read_column(tmp_path, "customer_name", ["#1", "##", "#王"]) == ["#1", "##", "#王"]


@pytest.mark.parametrize(
    ("text", "order_id"),
    [
        ('="0012"', "0012"),
        ("\t692001100000000701", "692001100000000701"),
        ("692001100000000701\t", "692001100000000701"),
        ("'00112", "00112"),
        ("\uff11\uff12\uff13", "123"),
        ("\uff21\uff0d\uff11", "A-1"),
        ("'", "'"),
        ("'a'", "'a'"),
        (" A2 ", " A2 "),
        ("\t", None),
    ],
)
def test_a_protected_id_is_the_id(tmp_path: Path, text: str, order_id: str | None) -> None:
    assert read_column(tmp_path, "order_id", [text]) == [order_id]


def test_lines_of_one_order_meet_whatever_protects_their_number(tmp_path: Path) -> None:
    orders: dict[str, dict[str, object]] = {name: {"column": name} for name in ROW}
    orders["amount"]["aggregate"] = "sum"
    profile = Profile.model_validate({"group": {"by": ["order_id"]}, "orders": orders})
    assert read_column(tmp_path, "order_id", ["\t77", "77", "'77", '="77"', "\uff17\uff17"], profile=profile) == ["77"]


ROUNDED = "is a longer number that a spreadsheet has rounded"


@pytest.mark.parametrize(
    ("column", "xml", "problem"),
    [
        ("order_id", '<c r="@"><v>2512360000000000000</v></c>', ROUNDED),
        ("order_id", '<c r="@" t="n"><v>2.5123600000000001E+18</v></c>', ROUNDED),
        ("order_id", '<c r="@"><v>1234567890123450</v></c>', ROUNDED),
        ("order_id", '<c r="@"><v>2.51236E18</v></c>', ROUNDED),
        ("order_id", '<c r="@"><v>2512360000123456789</v></c>', ROUNDED),
        ("amount", '<c r="@" t="e"><v>#N/A</v></c>', "'#N/A' is an error value of a spreadsheet"),
        (
            "amount",
            '<c r="@" t="e"><f>VLOOKUP(A1,B:B,1)</f><v>#REF!</v></c>',
            "'#REF!' is an error value of a spreadsheet",
        ),
        ("amount", '<c r="@"><f>E2*F2</f><v /></c>', "is a formula without a stored value"),
        ("amount", '<c r="@"><f>E2*F2</f><v></v></c>', "is a formula without a stored value"),
        ("amount", '<c r="@"><f>E2*F2</f></c>', "is a formula without a stored value"),
        ("ordered_at", '<c r="@" s="2"><f t="shared" si="0"/></c>', "is a formula without a stored value"),
    ],
)
@pytest.mark.parametrize("left", [0, 2])
def test_what_a_workbook_lost_is_found_in_it(tmp_path: Path, column: str, xml: str, problem: str, left: int) -> None:
    said = refused(workbook(tmp_path, column, [ROW[column], Xml(xml)], left=left))
    assert said.startswith(f"orders.xlsx, row 3, column '{column}': ")
    assert problem in said


@pytest.mark.parametrize("left", [0, 2])
def test_numbers_of_a_workbook_say_nothing_about_the_text_beside_them(tmp_path: Path, left: int) -> None:
    """数总是小数点；旁边的文字照文字的写法。"""
    said = refused(workbook(tmp_path, "amount", [12.5, "85.500", 7], left=left))
    assert said.startswith(
        "orders.xlsx, row 3, column 'amount': '85.500' is 85.500 with a decimal point and 85500 with a decimal comma"
    )
    mixed = workbook(
        tmp_path, "amount", [12.5, "85.500", "1.234,5", 0.25, Xml('<c r="@"><f>A1</f><v>1.5</v></c>')], left=left
    )
    assert read_file(mixed)[0]["amount"].to_list() == [
        Decimal(text) for text in ("12.5", "85500", "1234.5", "0.25", "1.5")
    ]
    alone = workbook(tmp_path, "quantity", [2, 1000, "1.500"], left=left)
    assert "'1.500' is 1.500 with a decimal point" in refused(alone)
    comma = read_file(alone, given=GivenConventions(decimal="comma"))[0]
    assert comma["quantity"].to_list() == [2, 1000, 1500]
    given = workbook(tmp_path, "amount", [12.5, 1.25, "85.500"], left=left)
    assert read_file(given, given=GivenConventions(decimal="comma"))[0]["amount"].to_list() == [
        Decimal("12.5"),
        Decimal("1.25"),
        Decimal(85500),
    ]


def test_a_workbook_in_an_archive_is_looked_at_too(tmp_path: Path) -> None:
    path = tmp_path / "orders.zip"

    def packed(column: str, *cells: Cell | Xml) -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(workbook(tmp_path, column, [*cells], left=1), "订单.xlsx")
        return path

    assert read_file(packed("amount", 12.5, "85.500", "1.234,5"))[0]["amount"].to_list() == [
        Decimal("12.5"),
        Decimal(85500),
        Decimal("1234.5"),
    ]
    assert "row 3, column 'amount': is a formula without a stored value" in refused(
        packed("amount", 1, Xml('<c r="@"><f>A1</f></c>'))
    )


def test_a_number_that_a_workbook_rounded_can_be_skipped(tmp_path: Path) -> None:
    path = workbook(tmp_path, "order_id", ["A1", Xml('<c r="@"><v>2.51236E+18</v></c>'), "A3"])
    assert "row 3, column 'order_id': '2.51236E+18' is a longer number that a spreadsheet has rounded" in refused(path)
    assert read_file(path, skip_bad_rows=True)[0]["order_id"].to_list() == ["A1", "A3"]


def test_a_number_of_a_workbook_with_three_decimals_is_what_it_is(tmp_path: Path) -> None:
    assert "'85.125' has more than 2 decimals" in refused(workbook(tmp_path, "amount", [85.125, 7]))


@pytest.mark.parametrize(
    "xml", ["<c r='@' t='e'><v>#N/A</v></c>", '<c r="@"><f>E2*F2</f></c>', '<c r="@"><v>2.51236E+18</v></c>']
)
def test_tags_may_have_a_prefix(tmp_path: Path, xml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prefixed(rows: list[list[Cell]]) -> str:
        text = re.sub(r"<(/?)(\w)", r"<\1x:\2", sheet_xml(rows))
        return text.replace("xmlns=", "xmlns:x=")

    sheet_xml = test_import_spreadsheet.sheet_xml
    monkeypatch.setattr("tests.unit.test_import_spreadsheet.sheet_xml", prefixed)
    assert "row 2, column 'order_id'" in refused(workbook(tmp_path, "order_id", [Xml(xml)]))


@pytest.mark.parametrize(
    ("column", "xml"),
    [
        ("备注", '<c r="@" t="e"><v>#N/A</v></c>'),
        ("备注", '<c r="@"><f>E2*F2</f></c>'),
        ("备注", '<c r="@"><v>2.5123600000000001E+18</v></c>'),
        ("order_status", '<c r="@" t="str"><f>IF(1,"","")</f><v></v></c>'),
        ("order_id", '<c r="@"><v>1234567890123456</v></c>'),
        ("order_id", '<c r="@" t="str"><f>TEXT(1)</f><v>2512360000123456789</v></c>'),
        ("amount", '<c r="@"><f>E2*F2</f><v>12.5</v></c>'),
    ],
)
def test_a_workbook_that_lost_nothing_that_is_used_is_read(tmp_path: Path, column: str, xml: str) -> None:
    assert read_file(workbook(tmp_path, column, ["x" if column == "备注" else ROW[column], Xml(xml)]))[0].height == 2
