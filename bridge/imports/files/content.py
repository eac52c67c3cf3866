"""来源文件的字节，不管它是单独一个文件，还是压缩包里的那一个。"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# zipfile 以 RuntimeError 说有密码，以它的子类说不认得的版本与压缩法；成员的名字不是它自称的编码是 UnicodeDecodeError
DAMAGED = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, UnicodeDecodeError)
"""解压缩时坏的、有密码的、用了不认得的办法的，各说各的。"""


@dataclass(frozen=True)
class Content:
    """可以从头读好几遍的字节。

    :param path: 人给的文件，消息里说的就是它。
    :param size: 共多少字节（压缩包里的不一定知道，取压缩前后较大的）。
    :param member: 压缩包里的名字。
    """

    path: Path
    size: int
    open: Callable[[], IO[bytes]]
    member: str | None = None

    def head(self, count: int) -> bytes:
        with self.open() as file:
            return file.read(count)


def file_content(path: Path) -> Content:
    return Content(path, path.stat().st_size, lambda: path.open("rb"))
