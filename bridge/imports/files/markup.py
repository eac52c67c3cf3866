"""读网页表格与 Excel 2003 的 XML 表格：平台常把它们叫作 .xls。"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser

import polars as pl

from bridge.imports.files.cells import MAX_COLUMNS, check_width
from bridge.imports.files.content import Content
from bridge.imports.files.encoding import Encoding, check_encoding, detect_encoding, read_text_blocks
from bridge.imports.files.sheet import LOST_CELLS, Merge, Sheet, check_size, choose_sheet
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import NO_VALUE

_MARKUP = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)?<(?:!doctype|html|head|meta|table|style|body|div|\?xml|\w*:?workbook)\b",
    re.I | re.S,
)
# 双精度数只有 15 位是准的，与工作簿里的数一样
_DECIMAL = re.compile(r"-?[0-9]{1,15}\.[0-9]+")
_CHARSET = re.compile(rb"""<(?:meta|\?xml)[^>]*(?:charset|encoding)\s*=\s*["']?([\w-]+)""", re.I)
# 网页里写的名字，与浏览器一样当作它们的超集
_SUPERSETS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "iso-8859-1": "cp1252",
    "us-ascii": "cp1252",
}


@dataclass
class _Table:
    name: str
    rows: list[list[str | None]] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    unread: list[tuple[int, int, str, None]] = field(default_factory=list)
    hidden_rows: int = 0
    numeric_rows: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


def is_markup(head: bytes) -> bool:
    return _MARKUP.match(head) is not None


def read_markup(content: Content, wanted: str | None) -> Sheet:
    """读一个表。几个表里只有一个超过一行时就是它。

    :raises ImportFileError: 没有表、说不准是哪一个，或编码不对。
    """
    path = content.path
    encoding = _find_encoding(content)
    parser = _Parser(content)
    for block in read_text_blocks(content, encoding):
        parser.feed(block.text)
    parser.close()
    tables = {table.name: table for table in parser.tables if any(cell for row in table.rows for cell in row)}
    if not tables:
        raise ImportFileError(
            path, f"the file is {parser.kind} without a table in it", advice="export it as CSV or .xlsx"
        )
    table = tables[
        choose_sheet(
            path, list(tables), [name for name, table in tables.items() if len(table.rows) > 1] or list(tables), wanted
        )
    ]
    width = max(map(len, table.rows))
    rows = [[*row, *[None] * (width - len(row))] for row in table.rows]
    cells = pl.DataFrame(rows, schema={f"column {number}": pl.String for number in range(width)}, orient="row")
    name = table.name if len(tables) > 1 or parser.kind != "HTML" else None
    unread = pl.DataFrame(table.unread, schema=LOST_CELLS, orient="row")
    return Sheet(
        f"{parser.kind}, {encoding.label}",
        name,
        cells,
        table.merges,
        unread,
        table.hidden_rows,
        (),
        lambda column: table.numeric_rows[column],
    )


def _find_encoding(content: Content) -> Encoding:
    named = _CHARSET.search(content.head(4096))
    name = named[1].decode().lower() if named else ""
    try:
        encoding = check_encoding(content, _SUPERSETS.get(name, name)) if name else detect_encoding(content)
    except LookupError:
        encoding = detect_encoding(content)
    if encoding.first_bad_byte is not None:
        raise ImportFileError(
            content.path, f"byte {encoding.first_bad_byte} is not {encoding.label}, which the file says it is"
        )
    return encoding


class _Parser(HTMLParser):
    """tr 与 Row 是一行，td、th 与 Cell 是一格；格里的表只算那一格的文字。"""

    def __init__(self, content: Content) -> None:
        super().__init__()
        self.tables: list[_Table] = []
        self.kind = "XML" if b"<?xml" in content.head(200) else "HTML"
        self._content = content
        self._depth = 0
        self._name: str | None = None
        self._text: list[str] | None = None
        self._place = (0, 0)
        self._formula = False
        self._number = False
        self._cells = 0
        # 从上面的行伸下来的合并，与这一行里开始的
        self._above: list[Merge] = []
        self._started: list[Merge] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        tag, given = tag.rpartition(":")[2], {key.rpartition(":")[2]: value or "" for key, value in attrs}
        if tag == "workbook":
            self.kind = "an Excel 2003 XML table"
        elif tag == "html":
            self.kind = "HTML"
        elif tag == "worksheet":
            self._name = given.get("name")
        elif tag == "table":
            self._depth += 1
            if self._depth == 1:
                self.tables.append(_Table(self._name or str(len(self.tables) + 1)))
                self._above, self._started = [], []
        elif self._depth == 1 and tag in ("tr", "row"):
            self._end_cell()
            self._start_row(given)
        elif self._depth == 1 and tag in ("td", "th", "cell"):
            self._end_cell()
            self._start_cell(given)
        elif tag == "data":
            self._number = given.get("type") == "Number"
        elif tag in ("br", "p", "div") and self._text:
            self._text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        tag = tag.rpartition(":")[2]
        if tag == "table":
            if self._depth == 1:
                self._end_cell()
            self._depth = max(0, self._depth - 1)
        elif self._depth == 1 and tag in ("td", "th", "cell", "tr", "row"):
            self._end_cell()

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _start_row(self, given: dict[str, str]) -> None:
        table = self.tables[-1]
        skipped = _number(given.get("index"), len(table.rows) + 1) - 1 - len(table.rows)
        check_size(self._content.path, len(table.rows) + max(0, skipped), 1)
        table.rows += [[] for _ in range(skipped + 1)]
        row = len(table.rows) - 1
        self._above = [merge for merge in (*self._above, *self._started) if merge.last_row >= row]
        self._started = []
        table.hidden_rows += (
            given.get("hidden") == "1" or re.search(r"display\s*:\s*none", given.get("style", "")) is not None
        )

    def _start_cell(self, given: dict[str, str]) -> None:
        table = self.tables[-1]
        if not table.rows:
            table.rows.append([])
        row = len(table.rows) - 1
        column = max(len(table.rows[row]), _number(given.get("index"), 1) - 1)
        while any(merge.first_column <= column <= merge.last_column for merge in self._above):
            column += 1
        across = max(_number(given.get("colspan"), 1), _number(given.get("mergeacross"), 0) + 1)
        down = max(_number(given.get("rowspan"), 1), _number(given.get("mergedown"), 0) + 1)
        check_width(
            self._content.path, min(column + across, MAX_COLUMNS + 1 if column > MAX_COLUMNS else column + across)
        )
        self._cells += column + across - len(table.rows[row])
        check_size(self._content.path, self._cells, 1)
        table.rows[row] += [None] * (column + across - len(table.rows[row]))
        if across > 1 or down > 1:
            table.merges.append(Merge(row, column, row + down - 1, column + across - 1))
            self._started.append(table.merges[-1])
        self._text, self._place, self._formula, self._number = [], (row, column), "formula" in given, False

    def _end_cell(self) -> None:
        if self._text is None:
            return
        row, column = self._place
        text = "".join(self._text).strip()
        if self._number:
            self.tables[-1].numeric_rows[column].append(row + 1)
            text = f"{float(text):.15g}" if _DECIMAL.fullmatch(text) else text
        self.tables[-1].rows[row][column] = text or None
        if self._formula and not text:
            self.tables[-1].unread.append((row, column, NO_VALUE, None))
        self._text = None


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 9 else otherwise
