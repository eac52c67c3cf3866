"""xlsx 里已经丢了的单元格：读表格的库把它们读成空的或舍入了的数，所以另看一遍工作表的 XML。

只用正则在压缩包里的 XML 上扫过去，找得到才算位置：一百万行也只要几秒，内存只占一块。
"""

from __future__ import annotations

import html
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import polars as pl

from bridge.imports.problems import ERROR_VALUE, NO_VALUE, PROBLEMS, ROUNDED

_CHUNK_BYTES = 4 << 20
# Excel 只留 15 位；双精度数里的整数到 2^53 为止是精确的
_KEPT = 10**15
_EXACT = 2**53
_ATTRIBUTE = re.compile(r"([\w:]+)\s*=\s*([\"'])(.*?)\2", re.DOTALL)
_PREFIX = re.compile(rb"<([A-Za-z0-9]+:)?worksheet[\s>]")
_TYPE = re.compile(rb"\st=[\"']([a-zA-Z]+)[\"']")
_PLACE = re.compile(rb"\sr=[\"']([A-Z]+)([0-9]+)[\"']")
# 把数字都换成 0、e 换成 E：一块里有没有长数字、科学记数法，一找便知
_FOLDED = bytes.maketrans(b"123456789e", b"000000000E")
_LONG_MARKS = (b"0" * 16, b"0E0", b"0E+0")


class _Patterns:
    """以标签的字面开头，所以扫得快；prefix 是命名空间前缀。"""

    def __init__(self, prefix: bytes) -> None:
        self.cell, self.formula, value = (b"<" + prefix + tag for tag in (b"c", b"f", b"v"))
        empty = rb"(?:" + value + rb"\s*/>|" + value + rb">\s*</" + prefix + rb"v>)?\s*"
        written = self.formula + rb"(?:\s[^>]*)?(?:/>|>[^<]*</" + prefix + rb"f>)\s*"
        self.no_value = re.compile(written + empty + rb"</" + prefix + rb"c>")
        self.error = re.compile(value + rb">(#[^<]*)<")
        self.long = re.compile(value + rb">(-?[0-9]{16,}(?:\.[0-9]*)?|-?[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]+)<")
        filled = rb"[0-9]+[\"'](?:[^>/]|/(?!>))*>"
        self.filled = re.compile(self.cell + rb"\s[^>]*?\br=[\"']([A-Z]+)" + filled)
        self.in_first = re.compile(rb"\sr=[\"']A" + filled)


def find_lost_cells(path: Path, sheet: str, columns: Sequence[str]) -> list[pl.DataFrame]:
    """出错的公式、没有存下值的公式、舍入了的长号码；行号是工作表的行号。不是 xlsx 的没有。"""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        part = _find_part(archive, sheet)
        if part is None:
            return []
        with archive.open(part) as content:
            found = list(_scan(content))
        if not found:
            return []
        with archive.open(part) as content:
            first = _first_column(content)
    rows = [
        (row, columns[position - first], problem, value) for row, position, problem, value in found if 0 <= position - first < len(columns)
    ]
    return [pl.DataFrame(rows, schema=PROBLEMS, orient="row")]


def find_numeric_rows(path: Path, sheet: str, columns: Sequence[str], column: str) -> frozenset[int]:
    """一列里单元格是数的那些行。"""
    if column not in columns or not zipfile.is_zipfile(path):
        return frozenset()
    with zipfile.ZipFile(path) as archive:
        part = _find_part(archive, sheet)
        if part is None:
            return frozenset()
        with archive.open(part) as content:
            position = _first_column(content) + list(columns).index(column)
        with archive.open(part) as content:
            return frozenset(_numeric_rows(content, position))


def _numeric_rows(content: IO[bytes], position: int) -> Iterator[int]:
    in_column = re.compile(rb"\sr=[\"']" + _column_letters(position) + rb"([0-9]+)[\"'][^>]*>")
    for patterns, chunk in _whole_rows(content):
        for match in in_column.finditer(chunk):
            start = chunk.rfind(patterns.cell, 0, match.start())
            if _type_of(chunk[start : match.end()]) in (b"", b"n"):
                yield int(match[1])


def _find_part(archive: zipfile.ZipFile, sheet: str) -> str | None:
    """工作表的 XML 在压缩包里的名字。"""
    try:
        sheets = _read_tags(archive, "xl/workbook.xml", "sheet")
        relations = _read_tags(archive, "xl/_rels/workbook.xml.rels", "Relationship")
    except KeyError:
        return None
    wanted = next((value for tag in sheets if tag.get("name") == sheet for name, value in tag.items() if name.endswith(":id")), None)
    target = next((tag.get("Target", "") for tag in relations if tag.get("Id") == wanted), "")
    part = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
    return part if part in archive.namelist() else None


def _read_tags(archive: zipfile.ZipFile, part: str, tag: str) -> list[dict[str, str]]:
    """XML 里叫这个名字的标签的属性。"""
    text = archive.read(part).decode("utf-8", "replace")
    tags = re.findall(rf"<(?:\w+:)?{tag}\s([^>]*)>", text)
    return [{name: html.unescape(value) for name, _, value in _ATTRIBUTE.findall(attributes)} for attributes in tags]


def _scan(content: IO[bytes]) -> Iterator[tuple[int, int, str, str | None]]:
    for patterns, chunk in _whole_rows(content):

        def attributes(match: re.Match[bytes], chunk: bytes = chunk, cell: bytes = patterns.cell) -> bytes:
            start = chunk.rfind(cell, 0, match.start())
            return chunk[start : chunk.find(b">", start)] if start >= 0 else b""

        if patterns.formula in chunk:
            for match in patterns.no_value.finditer(chunk):
                if _type_of(attributes(match)) != b"str":  # 结果是空字符串的公式有值
                    yield from _place(attributes(match), NO_VALUE, None)
        if b't="e"' in chunk or b"t='e'" in chunk:
            for match in patterns.error.finditer(chunk):
                if _type_of(attributes(match)) == b"e":
                    yield from _place(attributes(match), ERROR_VALUE, match[1].decode())
        folded = chunk.translate(_FOLDED)
        if any(mark in folded for mark in _LONG_MARKS):
            for match in patterns.long.finditer(chunk):
                if _type_of(attributes(match)) in (b"", b"n") and _is_rounded(match[1]):
                    yield from _place(attributes(match), ROUNDED, match[1].decode())


def _is_rounded(number: bytes) -> bool:
    size = abs(float(number))
    return size >= _KEPT and (size > _EXACT or int(size) % 10 == 0)


def _type_of(attributes: bytes) -> bytes:
    found = _TYPE.search(attributes)
    return found[1] if found else b""


def _place(attributes: bytes, problem: str, value: str | None) -> Iterator[tuple[int, int, str, str | None]]:
    found = _PLACE.search(attributes)
    if found:
        yield int(found[2]), _column_number(found[1]), problem, value


def _column_number(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + letter - 64
    return number


def _column_letters(number: int) -> bytes:
    letters = b""
    while number:
        number, letter = divmod(number - 1, 26)
        letters = bytes([65 + letter]) + letters
    return letters


def _first_column(content: IO[bytes]) -> int:
    """有内容的最左一列：读表格的库从它数起。"""
    first = 1 << 14
    for patterns, chunk in _whole_rows(content):
        if patterns.in_first.search(chunk):
            return 1
        first = min([first, *map(_column_number, set(patterns.filled.findall(chunk)))])
    return first


def _whole_rows(content: IO[bytes]) -> Iterator[tuple[_Patterns, bytes]]:
    """在行的末尾切开的块。"""
    patterns, rest = None, b""
    while block := content.read(_CHUNK_BYTES):
        chunk = rest + block
        if patterns is None:
            prefix = _PREFIX.search(chunk)
            patterns = _Patterns((prefix[1] or b"") if prefix else b"")
        end = chunk.rfind(b"row>") + len(b"row>")
        if end >= len(b"row>"):
            yield patterns, chunk[:end]
            chunk = chunk[end:]
        rest = chunk
