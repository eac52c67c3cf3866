"""服务器的小磁盘：各一个 tmpfs，把容量缩到用掉的那么多，它就满了。"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOM_MIB = 4_096
_LEFT_KIB = 64


@dataclass(frozen=True)
class Disk:
    """一台服务器的磁盘；容量只是上限，用多少才占多少内存。"""

    server: str
    folder: Path

    def fill(self) -> None:
        used = shutil.disk_usage(self.folder).used
        _mount("-o", f"remount,size={used // 1024 + _LEFT_KIB}k", str(self.folder))

    def free(self) -> None:
        _mount("-o", f"remount,size={_ROOM_MIB}m", str(self.folder))


@contextmanager
def small_disks(state_dir: Path, servers: Sequence[str]) -> Iterator[list[Disk]]:
    """装在服务器的文件夹上；不许挂载的机器上一个也没有。"""
    disks: list[Disk] = []
    try:
        for server in servers:
            folder = state_dir / server
            folder.mkdir(mode=0o700, parents=True)
            if not _mount("-t", "tmpfs", "-o", f"size={_ROOM_MIB}m,mode=0700", "tmpfs", str(folder)):
                break
            disks.append(Disk(server, folder))
        yield disks
    finally:
        for disk in disks:
            subprocess.run(["umount", str(disk.folder)], check=True)  # noqa: S607  # 系统的命令，下同


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0  # noqa: S607
