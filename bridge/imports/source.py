"""打开来源文件，不管它是文本还是表格。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bridge.imports.cells import Source
from bridge.imports.errors import ImportFileError
from bridge.imports.profile import FileFormat
from bridge.imports.spreadsheet import is_spreadsheet, open_spreadsheet
from bridge.imports.text_table import open_text_table


def open_source(path: Path, file: FileFormat) -> Source:
    """按 format 打开；没写就看内容。

    :raises ImportFileError: 没有这个文件、读不了、是空的，或表头不能用。
    """
    try:
        return replace(_open(path, file), reread=lambda: _open(path, file).blocks)
    except OSError as error:
        raise ImportFileError(path, f"the file cannot be read ({error.strerror})", advice=f"check the path {path}") from error


def _open(path: Path, file: FileFormat) -> Source:
    if file.format == "excel" or (file.format is None and is_spreadsheet(path)):
        return open_spreadsheet(path, file)
    return open_text_table(path, file)
