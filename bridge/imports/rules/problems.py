"""不能导入的行：记下行、列、原因与值；要跳过时写到文件旁边。"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

import polars as pl

from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import ROW_NUMBER

# 一行是一行文件的一个毛病；column 是来源列名（没有列时为空串），value 是原文
PROBLEMS = pl.Schema({ROW_NUMBER: pl.Int64(), "column": pl.String(), "problem": pl.String(), "value": pl.String()})

# 表格软件弄丢了的单元格：改文件里的这一格没有用，要回到丢之前
ROUNDED = "is a longer number that a spreadsheet has rounded: its last digits are lost"
MADE_DECIMAL = "is a number that a program has made a decimal"
MADE_DATE = "is a date: a spreadsheet may have made it out of the number"
ERROR_VALUE = "is an error value of a spreadsheet, the value is lost"
NO_VALUE = "is a formula without a stored value"
MERGED = "is merged with row"
EXPORT_AGAIN = "export again, or format the column as text before saving"
LOST = {
    ROUNDED: EXPORT_AGAIN,
    MADE_DECIMAL: "keep the column as text in the program that wrote the file",
    MADE_DATE: EXPORT_AGAIN,
    ERROR_VALUE: "export again, or widen the column and mend its formulas before saving",
    NO_VALUE: "open the file in a spreadsheet program and save it, so that the values are stored",
}
_SHOWN_ROWS = 5
_COPY_BYTES = 1 << 20


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
    """收集一次导入的坏行。write 为真时边收边写，存下了才有 `<文件名>.rejected.csv`，在 folder 里（缺省在文件旁边）；之后出了错就删掉它。"""

    def __init__(self, source: Path, *, write: bool, folder: Path | None = None) -> None:
        self._source = source
        self._folder = folder or source.parent
        self._write = write
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self._first: tuple[int, str, str, str | None] | None = None
        self._alike: list[int] = []
        self.count = 0

    def add(self, problems: pl.DataFrame, cells: pl.DataFrame) -> None:
        """记下一块里的坏行；cells 是这一块的原文。"""
        if not problems.height:
            return
        if self._first is None:
            # 只因同单的别行坏了的行没有自己的毛病，消息里不说它
            own = problems.filter((pl.col("column") != "") | pl.col("value").is_not_null())
            self._first = (own if own.height else problems).row(0)
        _, column, problem, _ = self._first
        alike = problems.filter(pl.col("column") == column, pl.col("problem") == problem)[ROW_NUMBER]
        self._alike += alike.head(_SHOWN_ROWS + 1 - len(self._alike)).to_list()
        self.count += problems.height
        if self._write:
            self._append(problems, cells)

    def error(self) -> ImportFileError:
        """以第一个坏行为内容的错误。"""
        row, column, problem, value = self._first or (0, "", "", None)
        others = ", ".join(map(str, self._alike[:_SHOWN_ROWS])) + (", …" if len(self._alike) > _SHOWN_ROWS else "")
        return ImportFileError(
            self._source,
            f"{problem} (rows {others})" if problem in LOST and len(self._alike) > 1 else problem,
            row=row,
            column=column or None,
            value=value,
            more_bad_rows=self.count - 1,
            advice=f"{LOST.get(problem, 'correct the file')}, or import the other rows with --skip-bad-rows",
        )

    def save(self) -> Path | None:
        """与提交同一步：没有导入的文件，旁边也没有它的坏行。没有坏行就没有文件。"""
        if self._file is None:
            return None
        self._path, target = self._create()
        with target:
            self._file.seek(0)
            shutil.copyfileobj(self._file, target, _COPY_BYTES)
        return self._path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._path is not None and kind is not None:
            self._path.unlink()

    def _append(self, problems: pl.DataFrame, cells: pl.DataFrame) -> None:
        originals = cells.rename({name: _original_name(name) for name in cells.columns if name != ROW_NUMBER})
        rows = (
            problems.drop("value")
            .join(originals, on=ROW_NUMBER, how="left", maintain_order="left")
            .rename({ROW_NUMBER: "row"})
        )
        first = self._file is None
        if self._file is None:
            with self._writing(self._folder):
                # 没有名字：进程死在哪里都不留下它。写不了的文件夹，头一个坏行就知道
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # 关在 __exit__ 里
        # 有标记 Excel 才当作 UTF-8 打开
        rows.write_csv(self._file, include_bom=first, include_header=first)

    def _create(self) -> tuple[Path, IO[bytes]]:
        """新建，不覆盖已有的：orders.csv.rejected.csv、orders.csv.rejected-2.csv ……"""
        number = 1
        while True:
            path = self._folder / f"{self._source.name}.rejected{f'-{number}' if number > 1 else ''}.csv"
            with suppress(FileExistsError), self._writing(path):
                return path, path.open("xb")
            number += 1

    @contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise ImportFileError(
                self._source,
                f"the bad rows cannot be written to {place}: {error.strerror}",
                advice="make its folder writable",
            ) from error


def _original_name(name: str) -> str:
    """来源列与前三列同名时让开。"""
    return f"{name}_original" if name in ("row", "column", "problem") else name
