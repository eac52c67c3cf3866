"""人给的参数是哪些文件：一个个点名的，文件夹里的表，标准输入（与别的只能读一遍的）。"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bridge.imports.files.source import TABLES, unreadable
from bridge.imports.rules.errors import ImportFileError

STDIN = Path("-")
STDIN_NAME = "stdin"
_FILES = {*TABLES, ".zip", ".gz"}
_REJECTED = re.compile(r"\.rejected(-\d+)?\.csv$")


@dataclass(frozen=True)
class Input:
    """一个要导入的文件。

    :param is_named: 人点了名的；不是的是在文件夹里找到的。
    :param rejected_folder: 跳过的坏行写在哪里；None 是文件旁边。
    """

    path: Path
    is_named: bool = True
    rejected_folder: Path | None = None

    @property
    def size(self) -> int:
        """读不了的由导入去说。"""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


@dataclass(frozen=True)
class Inputs:
    """:param left_out: 文件夹里没有当作表的，与为什么。
    :param is_single: 只给了一个文件。
    """

    files: Sequence[Input]
    left_out: Sequence[str]
    is_single: bool


@contextmanager
def gather_inputs(
    paths: Sequence[Path], *, stdin_name: str | None = None, on_spool: Callable[[Path], object] = lambda _: None
) -> Iterator[Inputs]:
    """参数的次序不变，文件夹里的按名字。只能读一遍的先存成临时文件，出来时删去。

    :param on_spool: 收到临时文件的文件夹：进程不等出来就结束的，自己删它。
    :raises ImportFileError: 文件夹读不了，或里面没有表：那时一个也还没有导入。
    """
    if paths.count(STDIN) > 1:
        raise ImportFileError(STDIN, "standard input is named twice; it can be read once", advice="name it once")
    files: list[Input] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="etl-import-") as spool:
        on_spool(Path(spool))
        for position, path in enumerate(paths):
            folder = Path(spool, str(position))
            try:
                if path == STDIN:
                    files.append(_spool(sys.stdin.buffer, folder / (stdin_name or STDIN_NAME)))
                elif path.is_fifo():
                    with path.open("rb") as stream:
                        files.append(_spool(stream, folder / path.name))
                elif path.is_dir():
                    found, others = find_tables(path)
                    files += [Input(table, is_named=False) for table in found]
                    left_out += others
                else:
                    files.append(Input(path))
            except OSError as error:
                raise unreadable(path, error) from error
        yield Inputs(files, left_out, is_single=len(paths) == 1 and not paths[0].is_dir())


def find_tables(folder: Path) -> tuple[list[Path], list[str]]:
    """文件夹里的表，与别的为什么不是；不看下一层。名字里的数按大小排：2 在 10 前面。

    :raises ImportFileError: 一个表也没有。
    """
    entries = sorted(folder.iterdir(), key=lambda path: _natural(path.name))
    reasons = {path: _why_left_out(path) for path in entries}
    tables = [path for path, reason in reasons.items() if reason is None]
    others = [f"{path.name} ({reason})" for path, reason in reasons.items() if reason is not None]
    if not tables:
        there = f": {', '.join(others[:20])}" if others else ""
        raise ImportFileError(folder, f"there is no table in the folder{there}", advice="name the files one by one")
    return tables, others


def _why_left_out(path: Path) -> str | None:
    if path.name.startswith("~$"):
        return "lock file of an office program"
    if path.name.startswith("."):
        return "hidden"
    if _REJECTED.search(path.name):
        return "bad rows of an import"
    if path.is_dir():
        return "a folder"
    if path.exists() and not path.is_file():
        return "not a file"
    return None if path.suffix.lower() in _FILES else "not named like a table"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _spool(stream: IO[bytes], path: Path) -> Input:
    """存成这个名字的文件：消息里、import_tasks 里都是它。"""
    try:
        path.parent.mkdir()
        with path.open("xb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except OSError as error:
        problem = f"it cannot be kept in {tempfile.gettempdir()} ({error.strerror})"
        raise ImportFileError(path, problem, advice="make room there, or set TMPDIR") from error
    return Input(path, rejected_folder=Path.cwd())
