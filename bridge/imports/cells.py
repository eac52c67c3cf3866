"""来源文件的单元格：不管文件是什么格式，都成为「行号 + 各列原文」的块。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from bridge.imports.errors import ImportFileError
from bridge.imports.problems import find_problems
from bridge.imports.profile import ROW_NUMBER

MAX_FIELD_CHARACTERS = 100_000


@dataclass(frozen=True)
class CellBlock:
    """一块：cells 每行一条记录，列是行号与来源各列的原文（空单元格是 NULL）；problems 是读的时候就发现的坏行。"""

    cells: pl.DataFrame
    problems: list[pl.DataFrame]
    end_byte: int


@dataclass(frozen=True)
class Source:
    """打开了的来源文件。

    :param columns: 列名，各不相同；空的表头叫 column_N。
    :param repeated: 表头里出现不止一次的名字，不能用来指一列。
    :param numeric_rows: 工作簿的一列里，数（不是文字）在哪些行；知道不了的没有。
    :param reread: 从头再读一遍：一列的写法要看后面的值才定得下来时用。
    """

    path: Path
    columns: tuple[str, ...]
    repeated: frozenset[str]
    is_spreadsheet: bool
    blocks: Iterator[CellBlock]
    numeric_rows: Callable[[str], Collection[int]] = lambda _: ()
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


def name_positions(count: int, given: Sequence[str], path: Path) -> tuple[str, ...]:
    """没有表头的文件的列名。"""
    if given and len(given) != count:
        raise ImportFileError(path, f"the first row has {count} columns, the profile names {len(given)}: {', '.join(given)}")
    return tuple(given) or tuple(f"column_{position}" for position in range(1, count + 1))


def find_bad_cells(cells: pl.DataFrame, *, broken: bool, encoding: str = "", first_bad_byte: int | None = None) -> list[pl.DataFrame]:
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
        problems.append(find_problems(cells, text.str.contains("\0", literal=True), column=name, problem="contains a NUL byte", value=text))
    return problems


def drop_empty_rows(cells: pl.DataFrame) -> pl.DataFrame:
    """一个值也没有的行不是记录（表格软件常在末尾留下）。"""
    return cells.filter(pl.any_horizontal(pl.exclude(ROW_NUMBER).is_not_null()))
