"""读工作簿：单元格是人看见的文字，行号是工作表的行号。"""

from __future__ import annotations

import zipfile
from decimal import Decimal
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from bridge.imports.errors import ImportFileError
from bridge.imports.mapping import map_columns
from bridge.imports.orders import OrderBlock, OrderBuilder
from bridge.imports.profile import FileFormat, Profile
from bridge.imports.reading import open_source

DATE, DATE_TIME = 1, 2
Cell = str | float | tuple[float, int] | bool | None
HEADER: list[Cell] = ["订单编号", "店铺", "买家昵称", "订单状态", "金额", "数量", "下单时间"]

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
CONTENT = "application/vnd.openxmlformats-officedocument.spreadsheetml"


def write_workbook(path: Path, **sheets: list[list[Cell]]) -> Path:
    """最小的 xlsx；一个元组是（数，样式），样式 1 是日期、2 是日期时间。"""
    numbers = range(1, len(sheets) + 1)
    types = "".join(f'<Override PartName="/xl/s{n}.xml" ContentType="{CONTENT}.worksheet+xml"/>' for n in numbers)
    links = "".join(f'<Relationship Id="r{n}" Type="{OFFICE}/worksheet" Target="s{n}.xml"/>' for n in numbers)
    names = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in zip(numbers, sheets, strict=True))
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{CONTENT}.sheet.main+xml"/><Override PartName="/xl/styles.xml" ContentType="{CONTENT}.styles+xml"/>{types}</Types>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type="{OFFICE}/officeDocument" '
        'Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets>{names}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">{links}'
        f'<Relationship Id="st" Type="{OFFICE}/styles" Target="styles.xml"/></Relationships>',
        "xl/styles.xml": f'<styleSheet xmlns="{MAIN}"><cellXfs>'
        '<xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="22"/></cellXfs></styleSheet>',
    }
    parts |= {f"xl/s{n}.xml": sheet_xml(rows) for n, rows in zip(numbers, sheets.values(), strict=True)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text if name.startswith("[") else f'<?xml version="1.0"?>{text}')
    return path


def sheet_xml(rows: list[list[Cell]]) -> str:
    cells = (
        "".join(cell_xml(f"{chr(65 + position)}{row}", cell) for position, cell in enumerate(line)) for row, line in enumerate(rows, 1)
    )
    lines = "".join(f'<row r="{row}">{line}</row>' for row, line in enumerate(cells, 1))
    return f'<worksheet xmlns="{MAIN}"><sheetData>{lines}</sheetData></worksheet>'


def cell_xml(place: str, cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return f'<c r="{place}" t="b"><v>{int(cell)}</v></c>'
        case str():
            return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(cell)}</t></is></c>'
        case (number, style):
            return f'<c r="{place}" s="{style}"><v>{number!r}</v></c>'
        case _:
            return f'<c r="{place}"><v>{cell!r}</v></c>'


def build(path: Path, profile: Profile | None = None) -> OrderBlock:
    source = open_source(path, profile.file if profile else FileFormat())
    return OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), "Asia/Shanghai").build(next(source.blocks))


def test_cells_are_read_as_a_person_sees_them(tmp_path: Path) -> None:
    line: list[Cell] = [
        123456789012345,
        29.330000000000002,
        0.1 + 0.2,
        1e21,
        True,
        " x ",
        (45658, DATE),
        (45658.503472222219, DATE_TIME),
        None,
    ]
    path = write_workbook(tmp_path / "a.xlsx", 单=[["n"] * 9, line])
    source = open_source(path, FileFormat(header=False))
    seen = [*next(source.blocks).cells.row(1)]
    assert seen == [
        2,
        "123456789012345",
        "29.33",
        "0.3",
        "1000000000000000000000",
        "true",
        " x ",
        "2025-01-01",
        "2025-01-01 12:05:00",
        None,
    ]


def test_a_workbook_becomes_orders_and_rows_are_numbered_like_the_sheet(tmp_path: Path) -> None:
    rows: list[list[Cell]] = [
        [],
        [],
        HEADER,
        [1001, "旗舰店", "张", "交易成功", 29.33, 3, (45658.503472222219, DATE_TIME)],
        [None, "", None],
        ["A2", "旗舰店", "李", "交易成功", "abc", 3, (45658, DATE)],
        ["A3", "旗舰店", "王", "交易成功", 5, 1, "2024-02-30"],
    ]
    built = build(write_workbook(tmp_path / "a.xlsx", 单=rows))
    assert built.orders.select("row_number", "order_id", "amount", "quantity").rows() == [(4, "1001", Decimal("29.33"), 3)]
    assert built.orders["ordered_at"].dt.to_string("%F %T").to_list() == ["2025-01-01 04:05:00"]
    assert [(row, column, value) for row, column, _, value in built.problems.rows()] == [(6, "金额", "abc"), (7, "下单时间", "2024-02-30")]


def test_real_date_cells_need_not_follow_the_format_of_the_profile(tmp_path: Path) -> None:
    orders = {"order_id": {"column": "a"}, "shop": {"constant": "s"}, "customer_name": {"column": "a"}}
    orders["ordered_at"] = {"column": "t", "format": "%d.%m.%Y"}
    built = build(
        write_workbook(tmp_path / "a.xlsx", 单=[["a", "t"], ["1", (45658, DATE)], ["2", "02.01.2025"]]),
        Profile.model_validate({"orders": orders}),
    )
    assert built.orders["ordered_at"].dt.to_string("%F %H").to_list() == ["2024-12-31 16", "2025-01-01 16"]


def test_the_content_decides_what_a_file_is(tmp_path: Path) -> None:
    workbook = write_workbook(tmp_path / "orders.csv", 单=[["a"], ["1"]])
    text = tmp_path / "orders.xls"
    text.write_text("a\tb\n1\t2\n")
    assert open_source(workbook, FileFormat()).is_spreadsheet
    assert open_source(text, FileFormat()).columns == ("a", "b")


def test_the_first_sheet_or_the_named_one_is_read(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", 一=[["a"], ["1"]], 二=[["b"], ["2"]])
    assert open_source(path, FileFormat()).columns == ("a",)
    assert open_source(path, FileFormat(sheet="二")).columns == ("b",)
    with pytest.raises(ImportFileError, match="there is no sheet '三'; the workbook has 一, 二"):
        open_source(path, FileFormat(sheet="三"))


def test_workbooks_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="the sheet is empty"):
        open_source(write_workbook(tmp_path / "a.xlsx", 单=[]), FileFormat())
    for mark in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        broken = tmp_path / "broken.xlsx"
        broken.write_bytes(mark + b"rubbish" * 200)
        with pytest.raises(ImportFileError, match="the workbook cannot be read"):
            open_source(broken, FileFormat())
