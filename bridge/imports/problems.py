"""不能导入的行：记下行、列、原因与值；要跳过时写到文件旁边。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import polars as pl

from bridge.imports.errors import ImportFileError
from bridge.imports.profile import ROW_NUMBER

# 一行是一行文件的一个毛病；column 是来源列名（没有列时为空串），value 是原文
PROBLEMS = pl.Schema({ROW_NUMBER: pl.Int64(), "column": pl.String(), "problem": pl.String(), "value": pl.String()})


def find_problems(
    frame: pl.DataFrame, condition: pl.Expr, *, column: str | pl.Expr, problem: str | pl.Expr, value: pl.Expr | None
) -> pl.DataFrame:
    """合乎条件的行各成一条；value 是出错的原文，没有就不给。"""
    return frame.filter(condition).select(
        ROW_NUMBER,
        (pl.lit(column) if isinstance(column, str) else column).alias("column"),
        (pl.lit(problem) if isinstance(problem, str) else problem).alias("problem"),
        (pl.lit(None) if value is None else value).cast(pl.String).alias("value"),
    )


def merge_problems(problems: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """每行只留第一个毛病，按行号排列。"""
    found = [frame for frame in problems if frame.height]
    if not found:
        return pl.DataFrame(schema=PROBLEMS)
    return pl.concat(found).unique(ROW_NUMBER, keep="first", maintain_order=True).sort(ROW_NUMBER)


class BadRows(AbstractContextManager["BadRows"]):
    """收集一次导入的坏行。write 为真时边收边写 `<文件名>.rejected.csv`；中途出了错就删掉它。"""

    def __init__(self, source: Path, *, write: bool) -> None:
        self._source = source
        self._write = write
        self._file: IO[bytes] | None = None
        self._first: tuple[int, str, str, str | None] | None = None
        self.path: Path | None = None
        self.count = 0

    def add(self, problems: pl.DataFrame, cells: pl.DataFrame) -> None:
        """记下一块里的坏行；cells 是这一块的原文。"""
        if not problems.height:
            return
        if self._first is None:
            # 只因同单的别行坏了的行没有自己的毛病，消息里不说它
            own = problems.filter((pl.col("column") != "") | pl.col("value").is_not_null())
            self._first = (own if own.height else problems).row(0)
        self.count += problems.height
        if self._write:
            self._append(problems, cells)

    def error(self) -> ImportFileError:
        """以第一个坏行为内容的错误。"""
        row, column, problem, value = self._first or (0, "", "", None)
        return ImportFileError(
            self._source,
            problem,
            row=row,
            column=column or None,
            value=value,
            more_bad_rows=self.count - 1,
            advice="correct the file, or import the other rows with --skip-bad-rows",
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self.path is not None and kind is not None:
            self.path.unlink()

    def _append(self, problems: pl.DataFrame, cells: pl.DataFrame) -> None:
        originals = cells.rename({name: _original_name(name) for name in cells.columns if name != ROW_NUMBER})
        rows = problems.drop("value").join(originals, on=ROW_NUMBER, how="left", maintain_order="left").rename({ROW_NUMBER: "row"})
        first = self._file is None
        if self._file is None:
            self._file = self._create()
        # 有标记 Excel 才当作 UTF-8 打开
        rows.write_csv(self._file, include_bom=first, include_header=first)

    def _create(self) -> IO[bytes]:
        """新建，不覆盖已有的：orders.csv.rejected.csv、orders.csv.rejected-2.csv ……"""
        number = 1
        while True:
            path = self._source.with_name(f"{self._source.name}.rejected{f'-{number}' if number > 1 else ''}.csv")
            try:
                file = path.open("xb")
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ImportFileError(
                    self._source, f"the bad rows cannot be written to {path}: {error.strerror}", advice="make its folder writable"
                ) from error
            else:
                self.path = path
                return file


def _original_name(name: str) -> str:
    """来源列与前三列同名时让开。"""
    return f"{name}_original" if name in ("row", "column", "problem") else name
