"""xlsx 工作表的 XML 里，读表格的库不说的：已经丢了的单元格（它读成空的或舍入了的数），哪些单元格是数。

只用正则在 XML 上扫过去，找得到才算位置：一百万行也只要几秒。块都在一行的末尾切开；行与列都从 0 数。
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain

from bridge.imports.rules.problems import ERROR_VALUE, NO_VALUE, ROUNDED

# Excel 只留 15 位；双精度数里的整数到 2^53 为止是精确的
_KEPT = 10**15
_EXACT = 2**53
_PREFIX = re.compile(rb"<([A-Za-z0-9]+:)?worksheet[\s>]")
_TYPE = re.compile(rb"\st=[\"']([a-zA-Z]+)[\"']")
_ANY_CELL = re.compile(rb"<(?:\w+:)?c(?:\s[^>]*)?/?>")
_ROW_OR_CELL = re.compile(rb"<((?:\w+:)?(?:row|c))((?:\s[^>]*)?/?)>")
_PLACE = re.compile(rb"\sr=[\"']([A-Z]+)([0-9]+)[\"']")
# 把数字都换成 0、e 换成 E：一块里有没有长数字、科学记数法，一找便知
_FOLDED = bytes.maketrans(b"123456789e", b"000000000E")
_LONG_MARKS = (b"0" * 16, b"0E0", b"0E+0")


class CellSearch:
    """一张工作表的单元格；head 是它的开头，标签有没有前缀由它知道。模式都以标签的字面开头，所以扫得快。"""

    def __init__(self, head: bytes) -> None:
        found = _PREFIX.search(head)
        prefix = (found[1] or b"") if found else b""
        self._cell, self._formula, value = (b"<" + prefix + tag for tag in (b"c", b"f", b"v"))
        empty = rb"(?:" + value + rb"\s*/>|" + value + rb">\s*</" + prefix + rb"v>)?\s*"
        written = self._formula + rb"(?:\s[^>]*)?(?:/>|>[^<]*</" + prefix + rb"f>)\s*"
        self._no_value = re.compile(written + empty + rb"</" + prefix + rb"c>")
        self._error = re.compile(value + rb">(#[^<]*)<")
        self._long = re.compile(value + rb">(-?[0-9]{16,}(?:\.[0-9]*)?|-?[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]+)<")

    def find_lost(self, chunk: bytes) -> Iterator[tuple[int, int, str, str | None]]:
        """没有存下值的公式、出错的公式、舍入了的长号码，照 LOST_CELLS。"""
        if self._formula in chunk:
            for match in self._no_value.finditer(chunk):
                attributes = self._attributes(chunk, match)
                if _type_of(attributes) != b"str":  # 结果是空字符串的公式有值
                    yield from _place(attributes, NO_VALUE, None)
        if b't="e"' in chunk or b"t='e'" in chunk:
            for match in self._error.finditer(chunk):
                attributes = self._attributes(chunk, match)
                if _type_of(attributes) == b"e":
                    yield from _place(attributes, ERROR_VALUE, match[1].decode())
        folded = chunk.translate(_FOLDED)
        if any(mark in folded for mark in _LONG_MARKS):
            for match in self._long.finditer(chunk):
                attributes = self._attributes(chunk, match)
                if _type_of(attributes) in (b"", b"n") and _is_rounded(match[1]):
                    yield from _place(attributes, ROUNDED, match[1].decode())

    def find_padded(self, chunk: bytes, styles: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
        """显示时补零的数：行、列与补到几位。"""
        style = b"|".join(map(str.encode, styles))
        for match in re.finditer(self._cell + rb"((?:\s[^>]*?)?\ss=[\"'](" + style + rb")[\"'][^>/]*)>", chunk):
            found = _PLACE.search(match[1])
            if found and _type_of(match[1]) in (b"", b"n"):
                yield int(found[2]) - 1, column_position(found[1].decode()), styles[match[2].decode()]

    def find_numeric_rows(self, chunk: bytes, position: int) -> Iterator[int]:
        """一列里单元格是数的那些行，从 1 数。"""
        for match in re.finditer(rb"\sr=[\"']" + column_letters(position) + rb"([0-9]+)[\"'][^>]*>", chunk):
            start = chunk.rfind(self._cell, 0, match.start())
            if _type_of(chunk[start : match.end()]) in (b"", b"n"):
                yield int(match[1])

    def _attributes(self, chunk: bytes, match: re.Match[bytes]) -> bytes:
        """值所在的那一格的标签。"""
        start = chunk.rfind(self._cell, 0, match.start())
        return chunk[start : chunk.find(b">", start)] if start >= 0 else b""


def place_cells(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """有的程序不写单元格在哪里（r），一格接着一格：看第一格便知，补上。"""
    first = next(chunks, b"")
    cell = _ANY_CELL.search(first)
    row, column = 0, -1

    def number(match: re.Match[bytes]) -> bytes:
        nonlocal row, column
        if match[1].endswith(b"row"):
            given = re.search(rb"\sr=[\"']([0-9]+)", match[2])
            row, column = int(given[1]) if given else row + 1, -1
            return match[0]
        given = _PLACE.search(match[2])
        column = column_position(given[1].decode()) if given else column + 1
        return match[0] if given else b'<%s r="%s%d"%s>' % (match[1], column_letters(column), row, match[2])

    for chunk in chain([first], chunks):
        yield chunk if cell is None or _PLACE.search(cell[0]) else _ROW_OR_CELL.sub(number, chunk)


def column_position(letters: str) -> int:
    """A 是 0。"""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - 64
    return number - 1


def column_letters(position: int) -> bytes:
    letters, number = b"", position + 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = bytes([65 + letter]) + letters
    return letters


def _is_rounded(number: bytes) -> bool:
    size = abs(float(number))
    return size >= _KEPT and (size > _EXACT or int(size) % 10 == 0)


def _type_of(attributes: bytes) -> bytes:
    found = _TYPE.search(attributes)
    return found[1] if found else b""


def _place(attributes: bytes, problem: str, value: str | None) -> Iterator[tuple[int, int, str, str | None]]:
    found = _PLACE.search(attributes)
    if found:
        yield int(found[2]) - 1, column_position(found[1].decode()), problem, value
