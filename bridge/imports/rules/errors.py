"""导入器的错误：指出文件、行、列与那个值，使人一看就知道改哪里。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge.errors import BridgeError
from etl_assets.core.errors import PermanentError

SHOWN_CHARACTERS = 60


def shorten(value: str) -> str:
    """消息里最多出现 60 个字符；控制字符以转义形式出现，不弄乱终端。"""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[: SHOWN_CHARACTERS - 1] + "…")


class ProfileError(BridgeError, PermanentError):
    """导入配置（TOML）不可用；消息含文件名与键名。"""


class ImportFileError(BridgeError, PermanentError):
    """文件不能导入，数据库里什么也没有写。

    :param row: 文件里的行号（从 1 数，记录开始的那一行）；整个文件的问题没有行号。
    :param more_bad_rows: 除这一行之外还有几行不能导入。
    """

    def __init__(
        self,
        file: Path,
        problem: str,
        *,
        row: int | None = None,
        column: str | None = None,
        value: str | None = None,
        more_bad_rows: int = 0,
        advice: str = "",
    ) -> None:
        self.file = file
        self.problem = problem
        self.row = row
        self.column = column
        self.value = value
        self.more_bad_rows = more_bad_rows
        place = file.name + (f", row {row}" if row is not None else "") + (f", column {column!r}" if column else "")
        shown = f"{shorten(value)} " if value is not None else ""
        more = f" ({more_bad_rows} more bad row{'s' if more_bad_rows > 1 else ''})" if more_bad_rows else ""
        super().__init__(f"{place}: {shown}{problem}{more}; nothing was imported" + (f": {advice}" if advice else ""))


@dataclass(frozen=True, order=True)
class SeenCell:
    """一个单元格：行号与原文。"""

    row: int
    value: str


@dataclass(frozen=True)
class ColumnReading:
    """一列按什么写法读的；because 是使之确定的那个单元格，None 是人说的。"""

    column: str
    convention: str
    because: SeenCell | None
