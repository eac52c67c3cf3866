"""读工作簿：单元格是人看见的文字，行号是工作表的行号。"""

from __future__ import annotations

import zipfile
from datetime import UTC, datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from string import ascii_uppercase
from xml.sax.saxutils import escape

import pytest

from bridge.imports.files import workbook
from bridge.imports.files.cells import Source
from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBlock, OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import ERROR_VALUE, NO_VALUE, merge_problems
from bridge.imports.rules.profile import FileFormat, Profile

EXPORTS = Path(__file__).parents[1] / "exports"
DATE, DATE_TIME, EIGHT_DIGITS = 1, 2, 3
Cell = str | float | tuple[float, int] | bool | None
HEADER: list[Cell] = ["订单编号", "店铺", "买家昵称", "订单状态", "金额", "数量", "下单时间"]

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
CONTENT = "application/vnd.openxmlformats-officedocument.spreadsheetml"


def write_workbook(path: Path, *, starts_1904: bool = False, **sheets: list[list[Cell]]) -> Path:
    """最小的 xlsx；一个元组是（数，样式），样式 1 是日期、2 是日期时间、3 补零到八位。"""
    numbers = range(1, len(sheets) + 1)
    types = "".join(f'<Override PartName="/xl/s{n}.xml" ContentType="{CONTENT}.worksheet+xml"/>' for n in numbers)
    links = "".join(f'<Relationship Id="r{n}" Type="{OFFICE}/worksheet" Target="s{n}.xml"/>' for n in numbers)
    names = "".join(
        f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in zip(numbers, sheets, strict=True)
    )
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{CONTENT}.sheet.main+xml"/><Override PartName="/xl/styles.xml" ContentType="{CONTENT}.styles+xml"/>{types}</Types>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type="{OFFICE}/officeDocument" '
        'Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><workbookPr date1904="{int(starts_1904)}"/>'
        f"<sheets>{names}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">{links}'
        f'<Relationship Id="st" Type="{OFFICE}/styles" Target="styles.xml"/></Relationships>',
        "xl/styles.xml": f'<styleSheet xmlns="{MAIN}"><numFmts><numFmt numFmtId="164" formatCode="00000000"/></numFmts><cellXfs>'
        '<xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="22"/><xf numFmtId="164"/></cellXfs></styleSheet>',
    }
    parts |= {f"xl/s{n}.xml": sheet_xml(rows) for n, rows in zip(numbers, sheets.values(), strict=True)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text if name.startswith("[") else f'<?xml version="1.0"?>{text}')
    return path


def sheet_xml(rows: list[list[Cell]]) -> str:
    cells = (
        "".join(cell_xml(f"{chr(65 + position)}{row}", cell) for position, cell in enumerate(line))
        for row, line in enumerate(rows, 1)
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
    return OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), "Asia/Shanghai").build(
        next(source.blocks)
    )


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


def test_days_of_a_workbook_that_counts_from_1904(tmp_path: Path) -> None:
    """读取器换算日期格式的单元格，只是数的由我们换算。"""
    serial = 46083.378472222219 - 1462
    for number, cell in enumerate([serial, (serial, DATE_TIME)]):
        line: list[Cell] = ["A1", "店", "张", "已完成", 1, 1, cell]
        path = write_workbook(tmp_path / f"{number}.xlsx", starts_1904=True, 单=[HEADER, line])
        assert build(path).orders["ordered_at"].to_list() == [datetime(2026, 3, 2, 1, 5, tzinfo=UTC)]


def test_a_number_is_shown_with_its_leading_zeros(tmp_path: Path) -> None:
    line: list[Cell] = [(1234, EIGHT_DIGITS), "店", (7, EIGHT_DIGITS), "已完成", 1, (5, EIGHT_DIGITS), (45658, DATE)]
    rows = [[], [None, *HEADER], [None, *line], [None, "A2", *line[1:]]]
    built = build(write_workbook(tmp_path / "a.xlsx", 单=rows))
    assert built.orders.select("order_id", "customer_name", "quantity").rows() == [
        ("00001234", "00000007", 5),
        ("A2", "00000007", 5),
    ]


def test_empty_cells_around_the_table_may_be_formatted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """只有样式、没有值的格子，读取器当作没有。"""
    plain = cell_xml

    def write(place: str, cell: Cell) -> str:
        return f'<c r="{place}" s="{EIGHT_DIGITS}"/>' if cell == "styled" else plain(place, cell)

    line: list[Cell] = [(1234, EIGHT_DIGITS), "店", "张三", "已完成", 1, 1, (45658, DATE)]
    monkeypatch.setattr("tests.unit.test_import_spreadsheet.cell_xml", write)
    rows = [["styled", *HEADER, "styled", "styled"], ["styled", *line, "styled", "styled"]]
    built = build(write_workbook(tmp_path / "a.xlsx", 单=rows))
    assert built.orders.select("order_id", "customer_name").rows() == [("00001234", "张三")]


@pytest.mark.parametrize("starts_1904", [False, True])
def test_a_cell_of_a_time_of_day_is_no_date(tmp_path: Path, *, starts_1904: bool) -> None:
    line: list[Cell] = ["A1", "店", "张", "已完成", 1, 1, (0.378472222219, DATE_TIME)]
    path = write_workbook(tmp_path / "a.xlsx", starts_1904=starts_1904, 单=[HEADER, line])
    (problem,) = build(path).problems["problem"]
    assert problem.startswith("is not a possible date and time")


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
    assert built.orders.select("row_number", "order_id", "amount", "quantity").rows() == [
        (4, "1001", Decimal("29.33"), 3)
    ]
    assert built.orders["ordered_at"].dt.to_string("%F %T").to_list() == ["2025-01-01 04:05:00"]
    assert [(row, column, value) for row, column, _, value in built.problems.rows()] == [
        (6, "金额", "abc"),
        (7, "下单时间", "2024-02-30"),
    ]


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


def patched(path: Path, old: str, new: str, part: str = "xl/s1.xml") -> Path:
    """改一改工作簿的 XML；old 必须在。"""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert old in parts[part]
    parts[part] = parts[part].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return path


def read(
    path: Path, file: FileFormat | None = None
) -> tuple[Source, list[tuple[object, ...]], list[tuple[int, str, str]]]:
    source = open_source(path, file or FileFormat())
    block = next(source.blocks)
    missing = block.find_missing(source.columns, source.columns)
    return source, block.cells.rows(), [row[:3] for row in merge_problems([*block.problems, missing]).rows()]


ROWS: list[list[Cell]] = [["no", "who", "paid"], ["A1", "王", 5], ["A2", "李", 6]]
READ = [(2, "A1", "王", "5"), (3, "A2", "李", "6")]


def test_one_filled_sheet_is_read_and_several_must_be_chosen_from(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_workbook(tmp_path / "a.xlsx", 一=[["a"], ["1"]], 空=[], 二=[["b"], ["2"]])
    with pytest.raises(
        ImportFileError, match=r"several sheets hold something: '一', '二'; nothing was imported: say which .* --sheet"
    ):
        open_source(path, FileFormat())
    assert open_source(path, FileFormat(sheet="二")).columns == ("b",)
    with pytest.raises(ImportFileError, match="there is no sheet '三'; the file has '一', '空', '二'"):
        open_source(path, FileFormat(sheet="三"))
    hidden = patched(path, '<sheet name="二"', '<sheet state="hidden" name="二"', "xl/workbook.xml")
    assert open_source(hidden, FileFormat()).shape.sheet == "一"
    assert capfd.readouterr() == ("", "")  # 读工作簿的库也不往终端写一个字


def test_titles_totals_and_hidden_rows_of_a_sheet(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", 单=[["订单导出"], [], *ROWS, ["总计", "-", 11]])
    source, rows, problems = read(patched(path, '<row r="4">', '<row r="4" spans="1:3" hidden="1">'))
    assert (rows, problems) == ([(4, "A1", "王", "5"), (5, "A2", "李", "6"), (6, "总计", "-", "11")], [])
    assert str(source.shape) == "workbook, sheet '单', header in row 3, 1 hidden row read like the others"
    wider = write_workbook(tmp_path / "b.xlsx", 单=[["no", "who", "paid", "at"], ["总计", "-", 11, "-"]])
    assert read(wider)[0].shape.total_rows == 1


@pytest.mark.parametrize("dimension", ["A1", "A1:B2", "A1:XFD1048576"])
def test_a_wrong_dimension_hides_nothing(tmp_path: Path, dimension: str) -> None:
    path = patched(
        write_workbook(tmp_path / "a.xlsx", 单=ROWS), "<sheetData>", f'<dimension ref="{dimension}"/><sheetData>'
    )
    assert read(path)[1] == READ


def test_cells_need_not_say_where_they_are(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", 单=[*ROWS, ["A3", "张", 7]])
    for place in (f"{letter}{row}" for letter in "ABC" for row in range(1, 5)):
        path = patched(path, f' r="{place}"', "")
    path = patched(path, '<row r="2">', "<row>")
    path = patched(path, "<c><v>6</v></c>", "<c><f>1+5</f></c>")
    path = patched(path, '<row r="4">', '<row r="5">')
    _, rows, problems = read(path)
    assert rows == [READ[0], (3, "A2", "李", None), (5, "A3", "张", "7")]
    assert problems == [(3, "paid", NO_VALUE)]


@pytest.mark.parametrize("place", ["XFD3", "XFD1048576", "C1048576"])
def test_a_stray_cell_far_away_is_left_out_and_said(tmp_path: Path, place: str) -> None:
    stray = f'<row r="{place.lstrip("XFDC")}"><c r="{place}" t="n"><v>1</v></c></row></sheetData>'
    path = patched(write_workbook(tmp_path / "a.xlsx", 单=ROWS), "</sheetData>", stray)
    source, rows, _ = read(path)
    assert rows[:2] == READ
    assert source.shape.stray_cells == ([] if place == "C1048576" else [place])


def test_sheets_with_too_many_columns_or_cells_are_refused_early(tmp_path: Path) -> None:
    names = ["".join(letters) for length in (1, 2, 3) for letters in product(ascii_uppercase, repeat=length)][:16384]
    cells = "".join(f'<c r="{name}4"><v>1</v></c>' for name in names)
    path = patched(
        write_workbook(tmp_path / "a.xlsx", 单=ROWS), "</sheetData>", f'<row r="4">{cells}</row></sheetData>'
    )
    with pytest.raises(ImportFileError, match="the table has 16,384 columns; at most 2,000 can be read"):
        open_source(path, FileFormat())
    cells = "".join(f'<c r="{name}1000000"><v>1</v></c>' for name in names[:30])
    path = patched(
        write_workbook(tmp_path / "b.xlsx", 单=ROWS), "</sheetData>", f'<row r="1000000">{cells}</row></sheetData>'
    )
    with pytest.raises(
        ImportFileError, match="the sheet spans 1,000,000 rows and 30 columns; at most 20,000,000 cells"
    ):
        open_source(path, FileFormat())


def test_a_workbook_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbook, "MAX_UNPACKED_BYTES", 5000)
    path = patched(write_workbook(tmp_path / "a.xlsx", 单=ROWS), "</sheetData>", " " * 10_000 + "</sheetData>")
    with pytest.raises(ImportFileError, match=r"the workbook unpacks to [0-9,]+ bytes; at most 5,000 are read"):
        open_source(path, FileFormat())


def test_cells_without_a_value_that_are_not_empty_are_bad_rows(tmp_path: Path) -> None:
    """左边空着的列，读取器不算，位置也不能错。"""
    rows: list[list[Cell]] = [[None, *line] for line in [*ROWS, ["A3", "张", 7], ["A4", "陈", 8], ["合计", None, 0]]]
    path = write_workbook(tmp_path / "a.xlsx", 单=rows)
    path = patched(path, '<row r="1">', '<row r="1"><c r="A1" s="1"></c>')
    path = patched(path, '<c r="D2"><v>5</v></c>', '<c r="D2"><f>1+4</f><v/></c>')
    path = patched(path, '<c r="D3"><v>6</v></c>', '<c r="D3" t="e"><v>#N/A</v></c>')
    path = patched(path, '<c r="D4"><v>7</v></c>', '<c r="D4" t="str"><f>IF(1,"","")</f><v></v></c>')
    path = patched(path, '<c r="D6"><v>0</v></c>', '<c r="D6"><f>SUM(D2:D5)</f><v/></c>')
    merged = '<c r="C5" t="inlineStr"><is><t xml:space="preserve">陈</t></is></c>'
    path = patched(path, merged, "")
    path = patched(path, "</worksheet>", '<mergeCells count="1"><mergeCell ref="C4:C5"/></mergeCells></worksheet>')
    source, cells, problems = read(path)
    assert cells == [(2, "A1", "王", None), (3, "A2", "李", None), (4, "A3", "张", None), (5, "A4", None, "8")]
    assert problems == [
        (2, "paid", NO_VALUE),
        (3, "paid", ERROR_VALUE),
        (5, "who", "is merged with row 4: unmerge the cells"),
    ]
    assert source.shape.total_rows == 1
    block = next(open_source(path, FileFormat()).blocks)
    assert block.find_missing(source.columns, {"no"}).is_empty()


def test_a_header_of_two_rows_is_merged(tmp_path: Path) -> None:
    header: list[list[Cell]] = [["订单", "收货信息", None, None, "金额"], [None, "姓名", "电话", "地址", None]]
    path = write_workbook(
        tmp_path / "a.xlsx", 单=[*header, ["A1", "王", "138", "杭州", 5], ["A2", "李", "139", "上海", 6]]
    )
    merges = '<mergeCells count="3"><mergeCell ref="A1:A2"/><mergeCell ref="B1:D1"/><mergeCell ref="E1:E2"/></mergeCells></worksheet>'
    source, rows, problems = read(patched(path, "</worksheet>", merges))
    assert (source.columns, problems) == (("订单", "姓名", "电话", "地址", "金额"), [])
    assert rows[0] == (3, "A1", "王", "138", "杭州", "5")


def test_a_reader_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """原生读取器的分配器会终止进程；没了的只是子进程。"""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fastexcel.py").write_text("import os\nos.abort()\n")
    with pytest.raises(
        ImportFileError,
        match=r"the workbook cannot be read \(the reader failed on it: it is damaged, or far too large\)",
    ):
        open_source(write_workbook(tmp_path / "a.xlsx", 单=ROWS), FileFormat())


OPEN_DOCUMENT = (
    '<?xml version="1.0"?><office:document-content xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" '
    'xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0" xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0">'
    '<office:body><office:spreadsheet><table:table table:name="单">{}</table:table></office:spreadsheet></office:body>'
    "</office:document-content>"
)


def write_open_document(path: Path, rows: list[list[str]], *, columns_repeated: int = 1) -> Path:
    cell = '<table:table-cell office:value-type="string" table:number-columns-repeated="{}"><text:p>{}</text:p></table:table-cell>'
    lines = ("".join(cell.format(columns_repeated, escape(text)) for text in row) for row in rows)
    empty = '<table:table-row table:number-rows-repeated="1048500"><table:table-cell table:number-columns-repeated="16384"/></table:table-row>'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("META-INF/manifest.xml", "<manifest/>")
        body = "".join(f"<table:table-row>{line}</table:table-row>" for line in lines)
        archive.writestr("content.xml", OPEN_DOCUMENT.format(body + empty))
    return path


def test_open_document_and_old_excel_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    path = write_open_document(tmp_path / "orders.csv", [["no", "who", "paid"], ["A1", "王", "5"], ["A2", "李", "6"]])
    assert read(path)[1] == READ
    wide = write_open_document(tmp_path / "wide.ods", [["x"]], columns_repeated=16384)
    with pytest.raises(ImportFileError, match="the table has 16,384 columns"):
        open_source(wide, FileFormat())
    source, rows, _ = read(EXPORTS / "excel97.xls")
    assert source.columns == ("订单编号", "店铺", "买家", "金额", "下单时间")
    assert rows == [
        (2, "A1", "店", "王伟", "12.5", "2026-03-02 09:05:00"),
        (3, "A2", "店", "李娜", "8", "2026-03-02 09:05:00"),
    ]


def test_workbooks_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="the sheet is empty"):
        open_source(write_workbook(tmp_path / "a.xlsx", 单=[]), FileFormat())
    for mark in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        broken = tmp_path / "broken.xlsx"
        broken.write_bytes(mark + b"rubbish" * 200)
        with pytest.raises(ImportFileError, match="the workbook cannot be read"):
            open_source(broken, FileFormat())
