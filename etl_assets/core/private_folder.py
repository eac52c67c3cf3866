"""只属于自己的文件夹：建立时 0700；里面的口令与地址 0600；同一时刻只有一个进程使用它。"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from etl_assets.core.errors import SettingsError


def create_private_folder(folder: Path) -> None:
    """:raises SettingsError: 建不了，或不能写。"""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot create the folder {folder} ({error.strerror}): choose another one with --state-dir") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise SettingsError(f"the folder {folder} is not yours to write: choose another one with --state-dir")


def write_private_file(path: Path, text: str) -> None:
    """整个替换，读者只会看到旧的或新的；权限 0600。"""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    fresh.replace(path)


def read_or_create_secret(path: Path) -> str:
    """一个随机口令，第一次用到时生成。只含十六进制数字，放进 URL 与配置文件都不用转义。"""
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        write_private_file(path, secrets.token_hex(24))
        return path.read_text(encoding="ascii")


class FolderLock:
    """文件夹里 `lock` 文件上的 flock；进程无论怎样结束，内核都会放开。"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """:raises SettingsError: 别的进程正在使用这个文件夹。"""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise SettingsError(
                f"another process is using the state folder {self._folder}: stop it first, or choose another one with --state-dir"
            ) from error
        self._descriptor = descriptor

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
