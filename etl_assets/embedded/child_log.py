"""子进程的日志文件：追加写；太大就留一份旧的，从头写起，启动时与运行中都一样。

运行中的子进程握着打开的文件，换名字它看不见：抄到旁边，再截到零。它以 O_APPEND 写，接着就从头写起。
抄与截之间写进来的几行会丢；日志只给人看，换来的是磁盘不会满。
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from etl_assets.core.errors import SettingsError, TransientError
from etl_assets.embedded.private_folder import append_private_file


class ChildStartError(TransientError):
    """一个子进程起不来。"""

    def __init__(self, *, name: str, log: Path, reason: str) -> None:
        self.name = name
        self.log = log
        self.reason = reason.removeprefix("error: ")
        super().__init__(f"{name} does not start: {self.reason or 'it wrote nothing'}; see {log}")


ROTATE_BYTES = 10 * 1024 * 1024
_TAIL_BYTES = 4096


def open_log(path: Path) -> IO[bytes]:
    rotate_log(path)
    return append_private_file(path)


def rotate_log(path: Path) -> bool:
    """太大了就抄走末尾这么多，清空；抄不下（磁盘满了）也清空。"""
    try:
        size = path.stat().st_size
    except FileNotFoundError:  # 还没有，或有人清掉了日志
        return False
    if size <= ROTATE_BYTES:
        return False
    old = path.with_name(f"{path.name}.1")
    try:
        old.unlink(missing_ok=True)
        with path.open("rb") as source, append_private_file(old) as target:
            source.seek(size - ROTATE_BYTES)
            shutil.copyfileobj(source, target)
    except (OSError, SettingsError):
        old.unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # 有人刚清掉了它
        os.truncate(path, 0)
    return True


def read_last_line(path: Path, start: int = 0) -> str:
    """从 `start` 字节以后的最后一个非空行；没有则为空串。"""
    if not path.exists():  # 有人清掉了日志
        return ""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
