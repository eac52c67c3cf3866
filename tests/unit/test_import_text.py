"""读文本表格：切记录、数行号、认编码、挑出坏单元格。"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.imports.files import encoding
from bridge.imports.files.cells import Source
from bridge.imports.files.content import file_content
from bridge.imports.files.encoding import detect_encoding
from bridge.imports.files.source import open_source
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import merge_problems
from bridge.imports.rules.profile import FileFormat

CELL = st.text(alphabet='ab1,"\n ;\t张é𝄞', max_size=6)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "orders.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, file: FileFormat | None = None) -> tuple[Source, pl.DataFrame, pl.DataFrame]:
    source = open_source(path, file or FileFormat())
    blocks = list(source.blocks)
    return (
        source,
        pl.concat([block.cells for block in blocks]),
        merge_problems([problem for block in blocks for problem in block.problems]),
    )


def read_rows(path: Path, file: FileFormat | None = None) -> list[tuple[object, ...]]:
    _, cells, problems = read(path, file)
    assert problems.is_empty()
    return cells.rows()


def problems_of(path: Path) -> list[tuple[int, str, str]]:
    _, _, problems = read(path)
    return [(row, column, problem) for row, column, problem, _ in problems.rows()]


# 一块只有几个字节，所以记录、引号都会跨块
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(min_value=8, max_value=200),
)
def test_records_and_their_lines_are_those_of_the_csv_standard(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    quoting: Literal[0, 1],
    line_end: str,
    block_bytes: int,
) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator=line_end).writerows([("x", "y", "z"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), text.getvalue())
    expected: list[tuple[object, ...]] = []
    line = 2
    for row in rows:
        record = io.StringIO()
        csv.writer(record, quoting=quoting, lineterminator=line_end).writerow(row)
        if any(row):
            expected.append((line, *(cell or None for cell in row)))
        line += record.getvalue().count("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
        assert read_rows(path) == expected


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "gb18030"])
def test_encoding_is_found_without_being_told(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path, "名字,数\n张三㐂,1\n".encode(codec))
    source, cells, _ = read(path)
    assert source.columns == ("名字", "数")
    assert cells.rows() == [(2, "张三㐂", "1")]


def test_damaged_utf8_is_not_read_as_gb18030(tmp_path: Path) -> None:
    damaged = "名字,数\n".encode() + "张三".encode()[:-1] + b",1\n" + "李四,2\n".encode()
    path = write(tmp_path, damaged)
    assert detect_encoding(file_content(path)).first_bad_byte == damaged.index(b",1\n") - 2
    assert problems_of(path) == [(2, "名字", "contains bytes that are not UTF-8 (the first in the file is byte 14)")]


def test_a_replacement_character_that_was_exported_is_data(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "a,b\n\ufffd,1\n")) == [(2, "\ufffd", "1")]


def test_the_encoding_of_the_profile_is_not_doubted(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\ncafé,1\n".encode("cp1252"))
    assert read_rows(path) == [(2, "café", "1")]
    assert read_rows(path, FileFormat(encoding="cp437")) == [(2, "cafΘ", "1")]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_separator_is_the_most_frequent_of_the_first_line(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, f"a{separator}b{separator}c d\n1{separator}{separator}x\n")
    assert read_rows(path) == [(2, "1", None, "x")]


def test_quotes_count_only_at_the_start_of_a_field(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, 'a,b\n5" pipe,3" tube\n"q""q","x,y"\n')) == [
        (2, '5" pipe', '3" tube'),
        (3, 'q"q', "x,y"),
    ]


def test_numbers_protected_from_spreadsheets_are_unwrapped(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, 'a,b\n="00123",="\n')) == [(2, "00123", '="')]


def test_empty_lines_and_rows_without_a_value_are_no_records(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "\n\na,b\n\n1,2\n,\n  \n3,4")) == [(5, "1", "2"), (8, "3", "4")]


def test_white_space_separated_columns_need_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, '  00004 0001\t19970101 "\r\n\r\n 00021 0002 x y\r\n')
    file = FileFormat(format="whitespace", header=False)
    assert read(path, file)[0].columns == ("column_1", "column_2", "column_3", "column_4")
    assert read_rows(path, file) == [(1, "00004", "0001", "19970101", '"'), (3, "00021", "0002", "x", "y")]


def test_ragged_rows_name_what_is_missing_or_too_much(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "a,b,c\n1\n1,2,3\n1,2,3,4,\n1,2,3,,\n"), FileFormat())
    block = next(source.blocks)
    assert merge_problems(block.problems).rows() == [(4, "", "is too much: the row has 5 fields instead of 3", "4 | ")]
    assert block.find_missing(source.columns, {"a"}).is_empty()
    assert block.find_missing(source.columns, {"c", "b"}).rows() == [
        (2, "b", "is missing: the row has 1 fields instead of 3", None)
    ]


def test_a_file_that_ends_in_the_middle_of_a_row_is_cut_off(tmp_path: Path) -> None:
    assert problems_of(write(tmp_path, "a,b,c\n1,2,3\n1,2")) == [
        (3, "b", "is cut off: the file ends before the row does")
    ]
    assert problems_of(write(tmp_path, "a,b,c\r1,2,3\r1,2,3")) == []


def test_bad_cells_are_found_in_every_column(tmp_path: Path) -> None:
    path = write(
        tmp_path, f'a,b\n1,{"张" * 100_000}\n2,{"x" * 100_001}\n3,"{"y" * 1_000_000}"\n4,n\0l\n5,"q"r\n6,"q"\n'
    )
    assert problems_of(path) == [
        (3, "b", "is longer than 100,000 characters"),
        (4, "b", "is longer than 100,000 characters"),
        (5, "b", "contains a NUL byte"),
        (6, "b", "has text after its closing quote"),
    ]


@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_a_quote_that_never_closes_names_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path, 'a,b\n"1\n2",x\n3,"open\n4,y\n5,z\n')
    with pytest.raises(ImportFileError, match=r"orders\.csv, row 4: a quote is opened and never closed"):
        read(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "orders.csv: the file is empty"),
        (b"\xef\xbb\xbf\n \n", "orders.csv: the file is empty"),
        (b"a\0b,c\n", "orders.csv, row 1: the first row contains a NUL byte"),
        (
            "张三,caf".encode() + b"\xe9\n1,2\n",
            r"orders.csv, row 1: the header contains bytes that are not UTF-8 \(byte 10\)",
        ),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ImportFileError, match=problem):
        read(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match=r"nothing\.csv: the file cannot be read \(No such file"):
        open_source(tmp_path / "nothing.csv", FileFormat())
    with pytest.raises(ImportFileError, match="Is a directory"):
        open_source(tmp_path, FileFormat())


def test_a_line_longer_than_the_limit_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(encoding, "MAX_RECORD_BYTES", 5000)
    with pytest.raises(ImportFileError, match="no line break within"):
        read(write(tmp_path, "x" * 10_000))


def test_header_names_stay_apart_and_are_never_patterns(tmp_path: Path) -> None:
    source, cells, _ = read(write(tmp_path, "a,,a,^.*$,*,row_number\n1,2,3,4,5,6\n"))
    assert source.columns == ("a", "column_2", "a_3", "column_4", "column_5", "row_number_6")
    assert source.repeated == {"a"}
    assert cells.rows() == [(2, "1", "2", "3", "4", "5", "6")]


@pytest.mark.parametrize("codec", ["idna", "punycode", "unicode_escape", "raw_unicode_escape"])
def test_an_encoding_that_is_no_encoding_of_files_is_refused(codec: str) -> None:
    with pytest.raises(ValueError, match="must be a text encoding such as utf-8"):
        FileFormat(encoding=codec)


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_an_encoding_that_needs_a_mark_says_so(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes("名,b\n张,1\n".encode())
    with pytest.raises(ImportFileError, match=f"is no text in {codec.upper()}"):
        read_rows(path, FileFormat(encoding=codec))
