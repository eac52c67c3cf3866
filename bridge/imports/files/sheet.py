"""一张工作表：不管它从哪种文件来，都是文字的表格，与怎样合并、隐藏、读不出的单元格。"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from bridge.imports.rules.errors import ImportFileError

# 一百万行、二十列；再多就该是文本文件
MAX_CELLS = 20_000_000
# 值丢了的单元格：行与列都从 0 数，为什么丢了，还看得见的值
LOST_CELLS = pl.Schema({"row": pl.Int64(), "position": pl.Int64(), "problem": pl.String(), "value": pl.String()})


@dataclass(frozen=True)
class Merge:
    """合并的单元格，行与列都从 0 数；只有左上角的那格有字。"""

    first_row: int
    first_column: int
    last_row: int
    last_column: int


@dataclass(frozen=True)
class Sheet:
    """cells 每行一行，连空行在内，列是位置，空的是 NULL。

    :param unread: 没有值、又不是空着的单元格，照 LOST_CELLS。
    :param numeric_rows: 一列里，数（不是文字）在哪些行，从 1 数；知道不了的没有。
    :param stray_cells: 离表格很远、没有读的单元格。
    :param starts_1904: 日子的序列数从 1904 年数起。
    """

    kind: str
    name: str | None
    cells: pl.DataFrame
    merges: Sequence[Merge] = ()
    unread: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=LOST_CELLS))
    hidden_rows: int = 0
    stray_cells: Sequence[str] = ()
    numeric_rows: Callable[[int], Collection[int]] = lambda _: ()
    starts_1904: bool = False


def choose_sheet(path: Path, names: Sequence[str], filled: Sequence[str], wanted: str | None) -> str:
    """:raises ImportFileError: 没有要的那张，或有好几张而没说要哪一张。"""
    shown = ", ".join(map(repr, names))
    if wanted is not None:
        if wanted not in names:
            raise ImportFileError(path, f"there is no sheet {wanted!r}; the file has {shown}")
        return wanted
    if not filled:
        raise ImportFileError(path, "the sheet is empty" if len(names) == 1 else f"all sheets are empty: {shown}")
    if len(filled) > 1:
        raise ImportFileError(
            path,
            f"several sheets hold something: {', '.join(map(repr, filled))}",
            advice="say which is meant with --sheet NAME",
        )
    return filled[0]


def check_size(path: Path, rows: int, columns: int) -> None:
    """:raises ImportFileError: 格子太多。"""
    if rows * columns > MAX_CELLS:
        problem = f"the sheet spans {rows:,} rows and {columns:,} columns; at most {MAX_CELLS:,} cells can be read"
        raise ImportFileError(path, problem, advice="delete what is not part of the table, or save it as CSV")
