"""来源文件的单元格：不管文件是什么格式，都成为「行号 + 各列原文」的块；文件是怎样读的，记在 Shape 里。"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import PROBLEMS, find_problems
from bridge.imports.rules.profile import ROW_NUMBER, FileFormat

MAX_FIELD_CHARACTERS = 100_000
MAX_COLUMNS = 2_000
# 找表头时看这么多行
HEADER_ROWS = 200
# 表头至少填满这么多，与最满的行比；标题行只有一两格
_HEADER_FILLED = 0.6
_VALUE = re.compile(r"[\s¥￥$€£+(-]*\d[\d.,:/\s%)元年月日-]*")
_TOTAL_NAMES = (
    r"[合总小共累總総]\s*[计計]",
    r"本页[合小]计|本頁[合小]計|总合计|總合計",
    r"共\s*[0-9,]+\s*[条條笔筆单單件行項项个個]?(?:订单|訂單)?",
    r"(?:grand|sub)?[\s-]*totals?",
    "(?:gesamt)?summe|gesamt|итого",
)
_TOTAL = rf"(?i)^\s*[(（\[【]?\s*(?:{'|'.join(_TOTAL_NAMES)})\s*[)）\]】]?\s*[:：]?\s*$"
_BLANK = ["-", "--", "—", "/"]
# 表下面的话在一行的前几格里
_FOOTER_CELLS = 3


SHORT_ROWS = pl.Schema({ROW_NUMBER: pl.Int64(), "fields": pl.UInt32()})


@dataclass
class Shape:
    """文件是怎样读的，给人看；后面几项边读边数。

    :ivar container: 在压缩包里的名字。
    :ivar separator: None 是空白分隔；工作簿没有。
    :ivar header_row: 没有表头时是 None。
    :ivar stray_cells: 离表格很远、没有读的单元格。
    """

    kind: str
    container: str | None = None
    encoding: str | None = None
    separator: str | None = None
    quotes: bool | None = None
    sheet: str | None = None
    header_row: int | None = None
    total_rows: int = 0
    repeated_headers: int = 0
    hidden_rows: int = 0
    stray_cells: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "vertical bar", " ": "space"}
        separator = names.get(self.separator, repr(self.separator)) if self.separator else None
        parts = [
            self.kind,
            self.container and f"from {self.container!r}",
            self.encoding,
            separator,
            "no quotes" if self.quotes is False else None,
            self.sheet and f"sheet {self.sheet!r}",
            f"header in row {self.header_row}" if self.header_row else "no header",
            _count(self.total_rows, "total row", "left out"),
            _count(self.repeated_headers, "repeated header", "left out"),
            _count(self.hidden_rows, "hidden row", "read like the others"),
            self.stray_cells and f"far from the table and left out: {', '.join(self.stray_cells)}",
        ]
        return ", ".join(part for part in parts if part)


def _count(number: int, what: str, done: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''} {done}" if number else ""


@dataclass(frozen=True)
class CellBlock:
    """一块：cells 每行一条记录，列是行号与来源各列的原文（空单元格是 NULL）；problems 是读的时候就发现的坏行。

    short_rows：字段少于表头的行与它的字段数。后面空着的字段可以不写，所以缺的列用不到才无妨。
    unread：没有值、又不是空着的单元格；同样，用不到才无妨。
    """

    cells: pl.DataFrame
    problems: list[pl.DataFrame]
    end_byte: int
    short_rows: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=SHORT_ROWS))
    unread: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PROBLEMS))

    def keep(self, rows: pl.Series) -> CellBlock:
        """只留这些行。"""
        return replace(self, cells=self.cells.filter(pl.col(ROW_NUMBER).is_in(rows.implode())))

    def find_missing(self, columns: Sequence[str], used: Collection[str]) -> pl.DataFrame:
        """缺了用得到的列、或它没有读出来的行。"""
        used = list(used)
        needed = pl.DataFrame({"column": columns, "position": range(len(columns))}).filter(pl.col("column").is_in(used))
        missing = (
            self.short_rows.join(needed, how="cross")
            .filter(pl.col("fields") <= pl.col("position"))
            .unique(ROW_NUMBER, keep="first")
        )
        left_out = find_problems(
            missing.sort(ROW_NUMBER),
            pl.lit(value=True),
            column=pl.col("column"),
            problem=pl.format(f"is missing: the row has {{}} fields instead of {len(columns)}", "fields"),
            value=None,
        )
        return pl.concat([left_out, self.unread.filter(pl.col("column").is_in(used))])


@dataclass(frozen=True)
class Source:
    """打开了的来源文件。

    :param columns: 列名，各不相同；空的表头叫 column_N。
    :param repeated: 表头里出现不止一次的名字，不能用来指一列。
    :param size: blocks 里的 end_byte 到多少为止。
    :param numeric_rows: 工作簿的一列里，数（不是文字）在哪些行；知道不了的没有。
    :param starts_1904: 日子的序列数从 1904 年数起。
    :param added: 文件里没有、配置说可以没有的列，排在最后，都是空的。
    :param reread: 从头再读一遍：一列的写法要看后面的值才定得下来时用。
    """

    path: Path
    columns: tuple[str, ...]
    repeated: frozenset[str]
    is_spreadsheet: bool
    blocks: Iterator[CellBlock]
    size: int
    shape: Shape
    numeric_rows: Callable[[str], Collection[int]] = lambda _: ()
    starts_1904: bool = False
    added: frozenset[str] = frozenset()
    reread: Callable[[], Iterator[CellBlock]] = lambda: iter(())


def name_columns(header: Sequence[str | None]) -> tuple[tuple[str, ...], frozenset[str]]:
    """由表头得到各不相同的列名，与重复的名字。row_number 留给行号；pl.col 当作通配的 * 与 ^…$ 换名。"""
    texts = [(name or "").strip() for name in header]
    stripped = [
        f"column_{position}" if text in ("", "*") or (text.startswith("^") and text.endswith("$")) else text
        for position, text in enumerate(texts, 1)
    ]
    counts = Counter(stripped)
    taken = {ROW_NUMBER, *counts}
    names: list[str] = []
    for position, name in enumerate(stripped, 1):
        unique = f"{name}_{position}" if name in names or name == ROW_NUMBER else name
        while unique != name and unique in taken:
            unique += "_"
        taken.add(unique)
        names.append(unique)
    return tuple(names), frozenset(name for name, count in counts.items() if count > 1)


def check_width(path: Path, width: int) -> None:
    """:raises ImportFileError: 列太多：每列都要花时间与内存，真的订单没有这么多列。"""
    if width > MAX_COLUMNS:
        raise ImportFileError(
            path, f"the table has {width:,} columns; at most {MAX_COLUMNS:,} can be read", advice="leave out the others"
        )


def find_header(rows: Sequence[Sequence[str | None]]) -> int:
    """表头是第几条：第一条填得够满、又没有数与日期的；找不到就是第一条。上面的是标题。"""
    filled = [sum(bool(cell and cell.strip()) for cell in row) for row in rows]
    enough = _HEADER_FILLED * max(filled, default=0)
    found = (
        position
        for position, row in enumerate(rows)
        if filled[position] > enough and not any(_VALUE.fullmatch(cell) for cell in row if cell)
    )
    return next(found, 0)


def leave_out(cells: pl.DataFrame, header: Sequence[str | None] | None, file: FileFormat, shape: Shape) -> pl.DataFrame:
    """去掉又出现一次的表头、合计行与表下面的话，数在 shape 里。合计行：第一个有字的格是「合计」之类，填了的格不过一半。"""
    columns = [name for name in cells.columns if name != ROW_NUMBER]
    if header:
        pairs = [(pl.col(name), text) for name, text in zip(columns, header, strict=True) if text]
        again = (
            cells.filter(pairs[0][0] == pairs[0][1]).filter(column == text for column, text in pairs[1:])
            if pairs
            else cells.clear()
        )
        if again.height:
            shape.repeated_headers += again.height
            cells = cells.join(again, on=ROW_NUMBER, how="anti", maintain_order="left")
    total = pl.coalesce(columns).str.contains(_TOTAL) if not file.keep_totals else pl.lit(value=False)
    if file.footers:
        total |= pl.any_horizontal(
            pl.col(name).str.contains_any(list(file.footers)) for name in columns[:_FOOTER_CELLS]
        )
    totals = cells.filter(total)
    if totals.height:
        empty = pl.sum_horizontal(
            (pl.col(name).is_null() | pl.col(name).is_in(_BLANK)).cast(pl.Int64) for name in columns
        )
        totals = totals.filter(empty * 2 >= len(columns))
        shape.total_rows += totals.height
        cells = cells.join(totals, on=ROW_NUMBER, how="anti", maintain_order="left")
    return cells


def name_positions(count: int, given: Sequence[str], path: Path) -> tuple[str, ...]:
    """没有表头的文件的列名。"""
    if given and len(given) != count:
        raise ImportFileError(
            path, f"the first row has {count} columns, the profile names {len(given)}: {', '.join(given)}"
        )
    return tuple(given) or tuple(f"column_{position}" for position in range(1, count + 1))


def find_bad_cells(
    cells: pl.DataFrame, *, broken: bool, encoding: str = "", first_bad_byte: int | None = None
) -> list[pl.DataFrame]:
    """任何一列里都不许有的：过长的字段、NUL、不合编码的字节。"""
    problems: list[pl.DataFrame] = []
    for name in cells.columns:
        if name == ROW_NUMBER:
            continue
        text = pl.col(name)
        longest = cells.select(text.str.len_bytes().max()).item() or 0
        if longest > MAX_FIELD_CHARACTERS:
            too_long = text.str.len_chars() > MAX_FIELD_CHARACTERS
            problem = f"is longer than {MAX_FIELD_CHARACTERS:,} characters"
            problems.append(find_problems(cells, too_long, column=name, problem=problem, value=text))
        if broken:
            problem = f"contains bytes that are not {encoding} (the first in the file is byte {first_bad_byte})"
            bad_bytes = text.str.contains("\ufffd", literal=True)
            problems.append(find_problems(cells, bad_bytes, column=name, problem=problem, value=text))
        problems.append(
            find_problems(
                cells, text.str.contains("\0", literal=True), column=name, problem="contains a NUL byte", value=text
            )
        )
    return problems


def drop_empty_rows(cells: pl.DataFrame) -> pl.DataFrame:
    """一个值也没有的行不是记录（表格软件常在末尾留下）。"""
    return cells.filter(pl.any_horizontal(pl.exclude(ROW_NUMBER).is_not_null()))
