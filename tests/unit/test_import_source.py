"""文件其实是什么：压缩包、网页、XML，与根本不是表格的；内容说了算，名字不算。"""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import pytest

from bridge.imports.files import source as sources
from bridge.imports.files.cells import Source
from bridge.imports.files.source import open_source
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import merge_problems
from bridge.imports.rules.profile import FileFormat

CSV = "订单编号,买家\nA1,王伟\nA2,李娜\n"
READ = [(2, "A1", "王伟"), (3, "A2", "李娜")]
PAGE = (
    '<html><head><meta charset="{}"><style>td {{ mso-number-format: "@" }}</style></head><body><h1>订单</h1>'
    "<table><tr><th>订单编号</th><th>买家</th></tr>{}</table></body></html>"
)
XML = (
    '<?xml version="1.0"?><?mso-application progid="Excel.Sheet"?><ss:Workbook xmlns:ss="urn:schemas-microsoft-com:office:spreadsheet">'
    '<ss:Worksheet ss:Name="订单"><ss:Table><ss:Row><ss:Cell><ss:Data ss:Type="String">订单编号</ss:Data></ss:Cell>'
    '<ss:Cell ss:MergeAcross="1"><ss:Data>买家</ss:Data></ss:Cell><ss:Cell><ss:Data>金额</ss:Data></ss:Cell></ss:Row>'
    '<ss:Row ss:Index="4" ss:Hidden="1"><ss:Cell><ss:Data>A&amp;1</ss:Data></ss:Cell>'
    '<ss:Cell ss:Index="4" ss:Formula="=1+1"/></ss:Row></ss:Table></ss:Worksheet>'
    '<ss:Worksheet ss:Name="Sheet2"><ss:Table/></ss:Worksheet></ss:Workbook>'
)


def read(path: Path, file: FileFormat | None = None) -> tuple[Source, list[tuple[object, ...]]]:
    source = open_source(path, file or FileFormat())
    block = next(source.blocks)
    assert merge_problems(block.problems).is_empty()
    return source, block.cells.rows()


def refused(path: Path) -> str:
    with pytest.raises(ImportFileError) as caught:
        read(path)
    return str(caught.value)


def zipped(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def nested() -> bytes:
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("a.csv", CSV)
    return inside.getvalue()


def test_the_one_table_in_an_archive_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.xls", {"readme.md": "hello", "__MACOSX/a.csv": "x", "orders.csv": CSV})
    source, rows = read(path)
    assert (str(source.shape), rows) == ("text, from 'orders.csv', UTF-8, comma, header in row 1", READ)
    packed = tmp_path / "orders.csv.gz"
    packed.write_bytes(gzip.compress(CSV.encode("gb18030")))
    source, rows = read(packed)
    assert (source.shape.container, source.shape.encoding, rows) == ("orders.csv", "GB18030", READ)


def test_a_name_that_chinese_windows_wrote_is_shown_as_it_is(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"AAAA.csv": CSV})
    path.write_bytes(path.read_bytes().replace(b"AAAA", "订单".encode("gbk")))
    assert read(path)[0].shape.container == "订单.csv"


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"a.csv": CSV, "b.csv": CSV}, "the archive holds 2 tables: 'a.csv', 'b.csv'; nothing was imported: unpack it"),
        ({"readme.md": "x"}, "there is no table in the archive"),
        ({"a.csv": nested()}, "there is an archive inside it ('a.csv')"),
    ],
)
def test_archives_that_are_not_one_table_are_refused(
    tmp_path: Path, members: dict[str, str | bytes], problem: str
) -> None:
    assert problem in refused(zipped(tmp_path / "a.zip", members))


def test_damaged_archives_and_bombs_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(CSV.encode())[:-9])
    assert "the archive cannot be unpacked (Compressed file ended" in refused(path)
    path = zipped(tmp_path / "a.zip", {"a.csv": CSV * 9})
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    assert "the archive cannot be unpacked" in refused(path)
    monkeypatch.setattr(sources, "_ALLOWED_BYTES", 1000)
    assert "unpack to more than" in refused(zipped(tmp_path / "b.zip", {"a.csv": CSV * 100_000}))


@pytest.mark.parametrize(
    ("at", "instead"),
    # 中央目录里：要多新的版本才解得开；名字是 UTF-8 的，而它不是
    [(6, (238).to_bytes(2, "little")), (8, (0x800).to_bytes(2, "little"))],
    ids=["version 23.8", "name that is not UTF-8"],
)
def test_archives_with_an_odd_directory_are_one_sentence(tmp_path: Path, at: int, instead: bytes) -> None:
    path = zipped(tmp_path / "a.zip", {"AAAA.csv": CSV})
    content = bytearray(path.read_bytes().replace(b"AAAA", "订单".encode("gbk")))
    entry = content.index(b"PK\x01\x02")
    content[entry + at : entry + at + 2] = instead
    path.write_bytes(content)
    assert "cannot be read" in refused(path)


def test_a_web_page_that_calls_itself_xls_is_read(tmp_path: Path) -> None:
    path = tmp_path / "orders.xls"
    rows = "<tr><td>A1<td>王&nbsp;<b>伟</b><tr style='display:none'><td>A2</td><td><table><tr><td>李</td></tr></table></td></tr>"
    path.write_bytes(PAGE.format("gb2312", rows).encode("gbk"))
    source, cells = read(path)
    assert cells == [(2, "A1", "王\xa0伟"), (3, "A2", "李")]
    assert str(source.shape) == "HTML, GB18030, header in row 1, 1 hidden row read like the others"


def test_cells_of_a_web_page_that_span_rows_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "orders.xls"
    path.write_text(
        "<table><tr><td colspan=3>订单导出</td></tr><tr><th rowspan=2>no</th><th colspan=2>who</th></tr>"
        "<tr><th>name</th><th>phone</th></tr><tr><td>A1</td><td>王</td><td>138</td></tr></table>"
    )
    source, rows = read(path)
    assert (source.columns, rows) == (("no", "name", "phone"), [(4, "A1", "王", "138")])


def test_an_xml_table_of_excel_2003_is_read(tmp_path: Path) -> None:
    path = tmp_path / "orders.xls"
    path.write_text(XML)
    source = open_source(path, FileFormat())
    block = next(source.blocks)
    assert source.columns == ("订单编号", "买家", "column_3", "金额")
    assert block.cells.rows() == [(4, "A&1", None, None, None)]
    assert [row[:2] for row in block.find_missing(source.columns, source.columns).rows()] == [(4, "金额")]
    assert (
        str(source.shape)
        == "an Excel 2003 XML table, UTF-8, sheet '订单', header in row 1, 1 hidden row read like the others"
    )


def test_numbers_of_an_xml_table_are_numbers(tmp_path: Path) -> None:
    """它们总是小数点、15 位有效数字；长的整数原样。"""
    path = tmp_path / "orders.xls"
    numbers = "".join(
        f'<ss:Row><ss:Cell><ss:Data ss:Type="{kind}">{text}</ss:Data></ss:Cell></ss:Row>'
        for kind, text in [
            ("Number", "29.330000000000002"),
            ("String", "85.500"),
            ("Number", "692001100000000701"),
            ("Number", "?."),
        ]
    )
    path.write_text(
        XML.replace(
            "</ss:Table></ss:Worksheet><ss:Worksheet ss", numbers + "</ss:Table></ss:Worksheet><ss:Worksheet ss"
        )
    )
    source = open_source(path, FileFormat())
    rows = next(source.blocks).cells.rows()
    assert [row[1] for row in rows] == ["A&1", "29.33", "85.500", "692001100000000701", "?."]
    assert set(source.numeric_rows("订单编号")) == {5, 7, 8}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"%PDF-1.7\n", "the file is a PDF document, not a table"),
        (b"\x89PNG\r\n\x1a\n", "the file is a picture, not a table"),
        (b"Rar!\x1a\x07", "the file is a RAR archive, not a table"),
        (b"<html><body>Please log in</body></html>", "the file is HTML without a table in it"),
        (b'<?xml version="1.0"?><orders><order id="1"/></orders>', "the file is XML without a table in it"),
        (b"<table><tr><td>a</td></tr></table>" * 2, "there is no column"),
        (PAGE.format("utf-8", "<tr><td>A1</td><td>王</td></tr>").encode("gbk"), "which the file says it is"),
        (b'<table><tr><td ss:index="99999999">a</td></tr></table>', "at most 2,000 can be read"),
        (b"<table><tr><td colspan='99999999'>a</td></tr></table>", "at most 2,000 can be read"),
        (b"<table><tr ss:index='99999999'><td>a</td></tr></table>", "at most 20,000,000 cells can be read"),
    ],
)
def test_what_is_no_table_is_said(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(content)
    if problem == "there is no column":
        assert "several sheets hold something: '1', '2'" in refused(path)
    else:
        assert problem in refused(path)
