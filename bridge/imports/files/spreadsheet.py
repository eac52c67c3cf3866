"""一张工作表成为来源：单元格是人看见的文字，行号是工作表的行号。"""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from bridge.imports.files.cells import (
    HEADER_ROWS,
    CellBlock,
    Shape,
    Source,
    check_width,
    drop_empty_rows,
    find_bad_cells,
    find_header,
    leave_out,
    name_columns,
    name_positions,
)
from bridge.imports.files.content import Content
from bridge.imports.files.sheet import LOST_CELLS, Sheet
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import MERGED, PROBLEMS
from bridge.imports.rules.profile import ROW_NUMBER, FileFormat


def open_sheet(content: Content, sheet: Sheet, file: FileFormat) -> Source:
    """认出表头；标题、合计、空行不是订单。

    :raises ImportFileError: 表是空的，或表头不能用。
    """
    path = content.path
    check_width(path, sheet.cells.width)
    cells = _show(sheet.cells)
    texts = [name for name in cells.columns if name != ROW_NUMBER]
    cells = drop_empty_rows(cells)
    if not cells.height:
        raise ImportFileError(path, "the sheet is empty")
    shape = Shape(
        sheet.kind, content.member, sheet=sheet.name, hidden_rows=sheet.hidden_rows, stray_cells=list(sheet.stray_cells)
    )
    repeated: frozenset[str] = frozenset()
    header: tuple[str | None, ...] | None = None
    if file.header:
        shape.header_row = _find_header_row(content, cells, sheet, file)
        header = _header(cells, sheet, shape.header_row)
        columns, repeated = name_columns(header)
        cells = cells.filter(pl.col(ROW_NUMBER) > shape.header_row)
    else:
        columns = name_positions(len(texts), file.columns, path)
    cells = cells.rename(dict(zip(texts, columns, strict=True)))
    cells = leave_out(cells, header, file, shape)
    block = CellBlock(
        cells, find_bad_cells(cells, broken=False), content.size, unread=_find_unread(sheet, cells, columns)
    )

    def numeric_rows(column: str) -> Collection[int]:
        return sheet.numeric_rows(columns.index(column)) if column in columns else ()

    return Source(
        path,
        columns,
        repeated,
        True,
        iter([block]),
        content.size,
        shape,
        numeric_rows,
        starts_1904=sheet.starts_1904,
    )


def _show(cells: pl.DataFrame) -> pl.DataFrame:
    """列名是位置；空单元格是 NULL，只有日期的日期时间去掉 00:00:00。"""
    texts = [
        pl.col(column).cast(pl.String).alias(f"column {position}") for position, column in enumerate(cells.columns)
    ]
    shown = [text.str.replace(r"^([0-9]{4}-[0-9]{2}-[0-9]{2}) 00:00:00$", "$1") for text in texts]
    return cells.select(
        pl.int_range(1, pl.len() + 1).alias(ROW_NUMBER), *(pl.when(text != "").then(text).name.keep() for text in shown)
    )


def _find_header_row(content: Content, cells: pl.DataFrame, sheet: Sheet, file: FileFormat) -> int:
    """表头在第几行；表头有合并到下一行的格，就到下一行为止。"""
    if file.header_row is not None:
        if file.header_row not in cells[ROW_NUMBER]:
            raise ImportFileError(content.path, f"there is no header in row {file.header_row}: the row is empty")
        return file.header_row
    head = cells.head(HEADER_ROWS)
    row = int(head[ROW_NUMBER][find_header(head.drop(ROW_NUMBER).rows())])
    return max(
        [
            row,
            *(merge.last_row + 1 for merge in sheet.merges if merge.first_row + 1 == row and merge.last_row < row + 3),
        ]
    )


def _header(cells: pl.DataFrame, sheet: Sheet, row: int) -> tuple[str | None, ...]:
    """表头的文字；向下合并的格，字在上面。"""
    names = list(cells.filter(pl.col(ROW_NUMBER) == row).drop(ROW_NUMBER).row(0))
    for merge in sheet.merges:
        if merge.first_row + 1 < row <= merge.last_row + 1 and names[merge.first_column] is None:
            names[merge.first_column] = sheet.cells[merge.first_row, merge.first_column]
    return tuple(names)


def _find_unread(sheet: Sheet, cells: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    """值已经丢了的单元格：公式没有结果、错误值、舍入了的长号码，或者合并到上一行去了。"""
    merged = [
        (row, merge.first_column, f"{MERGED} {merge.first_row + 1}: unmerge the cells", None)
        for merge in sheet.merges
        for row in range(merge.first_row + 1, min(merge.last_row, sheet.cells.height - 1) + 1)
    ]
    unread = pl.concat([pl.DataFrame(merged, schema=LOST_CELLS, orient="row"), sheet.unread])
    names = pl.DataFrame({"position": range(len(columns)), "column": columns})
    found = unread.join(names, on="position", how="inner", maintain_order="left").with_columns(
        (pl.col("row") + 1).alias(ROW_NUMBER)
    )
    return found.select(PROBLEMS.names()).join(
        cells.select(ROW_NUMBER), on=ROW_NUMBER, how="semi", maintain_order="left"
    )
