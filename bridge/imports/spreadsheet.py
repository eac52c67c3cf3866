"""读 Excel 与 OpenDocument 表格：单元格成为人看见的文字，行号是工作表的行号。"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import fastexcel
import polars as pl

from bridge.imports.cells import CellBlock, Source, drop_empty_rows, find_bad_cells, name_columns, name_positions
from bridge.imports.errors import ImportFileError
from bridge.imports.profile import ROW_NUMBER, FileFormat
from bridge.imports.workbook_cells import find_lost_cells, find_numeric_rows
from etl_assets.core.log import get_logger

logger = get_logger(__name__)

_ZIP_MARK = b"PK\x03\x04"  # xlsx、xlsb、ods
_OLE_MARK = b"\xd0\xcf\x11\xe0"  # xls


def is_spreadsheet(path: Path) -> bool:
    """看内容不看扩展名：平台导出的 .xls 常常其实是文本，.csv 偶尔其实是 xlsx。"""
    with path.open("rb") as file:
        return file.read(4) in (_ZIP_MARK, _OLE_MARK)


def open_spreadsheet(path: Path, file: FileFormat) -> Source:
    """打开工作簿，默认第一张工作表。

    :raises ImportFileError: 打不开（有密码、损坏）、没有这张表、表是空的。
    """
    sheet, cells = _read_sheet(path, file.sheet)
    texts = [name for name in cells.columns if name != ROW_NUMBER]
    cells = drop_empty_rows(cells)
    if not cells.height:
        raise ImportFileError(path, "the sheet is empty")
    repeated: frozenset[str] = frozenset()
    if file.header:
        columns, repeated = name_columns(cells.select(texts).row(0))
        cells = cells[1:]
    else:
        columns = name_positions(len(texts), file.columns, path)
    cells = cells.rename(dict(zip(texts, columns, strict=True)))
    block = CellBlock(cells, [*find_bad_cells(cells, broken=False), *find_lost_cells(path, sheet, columns)], path.stat().st_size)
    return Source(path, columns, repeated, True, iter([block]), partial(find_numeric_rows, path, sheet, columns))


def _read_sheet(path: Path, sheet: str | None) -> tuple[str, pl.DataFrame]:
    """一张工作表的名字与全部行，列名是位置；空单元格是 NULL，只有日期的日期时间去掉 00:00:00。"""
    try:
        content = path.read_bytes()
        name = _choose_sheet(path, fastexcel.read_excel(content).sheet_names, sheet)
        frame = pl.read_excel(
            content,
            sheet_name=name,
            has_header=False,
            drop_empty_rows=False,
            drop_empty_cols=False,
            raise_if_empty=False,
            # 不跳过开头的空行，否则行号不是工作表的行号
            read_options={"dtypes": "string", "skip_rows": 0},
        )
    except fastexcel.FastExcelError as error:
        reason = str(error).splitlines()[0]
        raise ImportFileError(
            path, f"the workbook cannot be read ({reason})", advice="save it without a password as .xlsx or CSV"
        ) from error
    texts = [pl.col(column).cast(pl.String).alias(f"column {position}") for position, column in enumerate(frame.columns)]
    shown = [text.str.replace(r"^([0-9]{4}-[0-9]{2}-[0-9]{2}) 00:00:00$", "$1") for text in texts]
    return name, frame.select(
        pl.int_range(1, pl.len() + 1).alias(ROW_NUMBER), *(pl.when(text != "").then(text).name.keep() for text in shown)
    )


def _choose_sheet(path: Path, names: list[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in names:
        raise ImportFileError(path, f"there is no sheet {wanted!r}; the workbook has {', '.join(names)}")
    chosen = wanted or names[0]
    if wanted is None and len(names) > 1:
        logger.warning("only the first sheet is imported", file=path.name, sheet=chosen, other_sheets=names[1:])
    return chosen
