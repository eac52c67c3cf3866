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

_P = rb"(?:[A-Za-z0-9]+:)?"  # 命名空间前缀
_CELL = rb"<" + _P + rb"c(\s[^>]*)?>\s*"
_FORMULA = rb"<" + _P + rb"f(?:\s[^>]*)?(?:/>|>[^<]*</" + _P + rb"f>)\s*"
_EMPTY_VALUE = rb"(?:<" + _P + rb"v\s*/>|<" + _P + rb"v>\s*</" + _P + rb"v>)?\s*"
_NO_VALUE = re.compile(_CELL + _FORMULA + _EMPTY_VALUE + rb"</" + _P + rb"c>")
_VALUE = _CELL + rb"(?:" + _FORMULA + rb")?<" + _P + rb"v>"
_ERROR = re.compile(_VALUE + rb"(#[^<]*|Err:[0-9]+)</")
_LONG = re.compile(_VALUE + rb"(-?[0-9]{16,}(?:\.[0-9]*)?|-?[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]+)</")
_TYPE = re.compile(rb"\st=[\"']([a-zA-Z]+)[\"']")
_PLACE = re.compile(rb"\sr=[\"']([A-Z]+)([0-9]+)[\"']")
_FILLED = re.compile(rb"<" + _P + rb"c\s[^>]*?\br=[\"']([A-Z]+)[0-9]+[\"'](?:[^>/]|/(?!>))*>")
_ROW_END = re.compile(rb"</" + _P + rb"row>")


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
            first = min(_filled_columns(content), default=1)
    rows = [
        (row, columns[position - first], problem, value) for row, position, problem, value in found if 0 <= position - first < len(columns)
    ]
    return [pl.DataFrame(rows, schema=PROBLEMS, orient="row")]


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
    for chunk in _whole_rows(content):
        for match in _NO_VALUE.finditer(chunk):
            if _type_of(match[1]) != b"str":  # 结果是空字符串的公式有值
                yield from _place(match[1], NO_VALUE, None)
        for match in _ERROR.finditer(chunk):
            if _type_of(match[1]) == b"e":
                yield from _place(match[1], ERROR_VALUE, match[2].decode())
        for match in _LONG.finditer(chunk):
            if _type_of(match[1]) in (b"", b"n") and _is_rounded(match[2]):
                yield from _place(match[1], ROUNDED, match[2].decode())


def _is_rounded(number: bytes) -> bool:
    size = abs(float(number))
    return size >= _KEPT and (size > _EXACT or int(size) % 10 == 0)


def _type_of(attributes: bytes | None) -> bytes:
    found = _TYPE.search(attributes or b"")
    return found[1] if found else b""


def _place(attributes: bytes | None, problem: str, value: str | None) -> Iterator[tuple[int, int, str, str | None]]:
    found = _PLACE.search(attributes or b"")
    if found:
        yield int(found[2]), _column_number(found[1]), problem, value


def _column_number(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + letter - 64
    return number


def _filled_columns(content: IO[bytes]) -> Iterator[int]:
    """有内容的列：读表格的库从其中最左的一列数起。"""
    for chunk in _whole_rows(content):
        for letters in {match[1] for match in _FILLED.finditer(chunk)}:
            yield _column_number(letters)


def _whole_rows(content: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := content.read(_CHUNK_BYTES):
        chunk = rest + block
        end = max((match.end() for match in _ROW_END.finditer(chunk)), default=0)
        yield chunk[:end]
        rest = chunk[end:]
    yield rest
