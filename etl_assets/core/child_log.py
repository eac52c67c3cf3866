"""子进程的日志文件：追加写；启动时太大就换一个，只留一份旧的。"""

from __future__ import annotations

from pathlib import Path
from typing import IO

_ROTATE_BYTES = 10 * 1024 * 1024
_TAIL_BYTES = 4096


def open_log(path: Path) -> IO[bytes]:
    if path.exists() and path.stat().st_size > _ROTATE_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    return path.open("ab")


def read_last_line(path: Path, start: int = 0) -> str:
    """从 `start` 字节以后的最后一个非空行；没有则为空串。"""
    if not path.exists():  # 有人清掉了日志
        return ""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
