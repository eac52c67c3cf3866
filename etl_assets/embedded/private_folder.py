"""只属于自己的文件夹：0700；里面的文件 0600；同一时刻只有一个进程使用它。

里面有口令，有会被执行、被导入、被当作数据库的东西：别的账户能事先放进来、能换掉的，一概不用。
查一次就够：文件夹归自己、别人写不了、上面各级别人换不掉，此后就没有别人能动它。
"""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from etl_assets.core.errors import SettingsError

_ADVICE = "choose another folder with --state-dir"


def create_private_folder(folder: Path, *, guests: Mapping[str, int] = {}) -> None:
    """没有就建立，上面缺的各级也只给自己；有就检查，别人读得到的改成 0700。

    :param guests: 里面哪一项（名字）可以属于哪个账户（uid）。
    :raises SettingsError: 建不了，不能写，或者它、它里面的东西、它上面的文件夹有别人能动的。
    """
    missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    try:
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
        check_private_folder(folder, guests=guests)
        if stat.S_IMODE(folder.stat().st_mode) & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise SettingsError(f"cannot create the folder {folder} ({error.strerror}): {_ADVICE}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise SettingsError(f"the folder {folder} is not yours to write: {_ADVICE}")


def check_private_folder(folder: Path, *, guests: Mapping[str, int] = {}) -> None:
    """:raises SettingsError: 一句话，说出哪一个路径、怎么办。"""
    for parent in reversed(folder.absolute().parents):
        _check_parent(parent)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise SettingsError(
            f"{folder} is not a folder of its own but a link or a file: name the folder itself with --state-dir"
        )
    if status.st_uid != os.geteuid():
        raise SettingsError(f"the folder {folder} belongs to {_name(status.st_uid)}: {_ADVICE}")
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if entries and _others_write(status):
        raise SettingsError(
            f"others may have put files into {folder}, they can write to it: look what is in there, then `chmod 700 {folder}`, or {_ADVICE}"
        )
    for entry in entries:
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # 正在使用它的那个进程刚换掉的
            continue
        if entry.is_symlink():
            raise SettingsError(
                f"{entry.path} is a symbolic link, which is not followed: put the thing itself there, or {_ADVICE}"
            )
        if found.st_uid not in (os.geteuid(), 0, guests.get(entry.name)):
            raise SettingsError(
                f"{entry.path} belongs to {_name(found.st_uid)}: remove it if it is not yours, or {_ADVICE}"
            )


def _check_parent(parent: Path) -> None:
    """能改名、能换掉下一级的，只能是自己或 root；带粘滞位的（/tmp）谁也换不掉别人的。指路的链接也一样。"""
    status = parent.lstat()
    if status.st_uid not in (os.geteuid(), 0):
        raise SettingsError(f"{parent} belongs to {_name(status.st_uid)}, who could replace what is in it: {_ADVICE}")
    if stat.S_ISLNK(status.st_mode):
        target = parent.resolve(strict=True)
        for step in (*reversed(target.parents), target):
            _check_parent(step)
    elif _others_write(status) and not status.st_mode & stat.S_ISVTX:
        raise SettingsError(
            f"others can write to {parent} and replace what is in it: `chmod go-w {parent}`, or {_ADVICE}"
        )


def _others_write(status: os.stat_result) -> bool:
    """组能写算不算，看组里有没有别人：有的系统（umask 002）给每个账户一个自己的组。"""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)


def _is_own_group(gid: int) -> bool:
    if gid == 0:
        return True
    try:
        members = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(gid).gr_mem}
    except KeyError:
        return False
    members |= {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid}
    return members <= {os.geteuid(), 0}


def _name(uid: int) -> str:
    try:
        return f"the account {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user id {uid}"


def open_private_file(path: Path, flags: int) -> int:
    """打开自己的一个文件，没有就按 0600 建立（O_CREAT）；不跟着链接走，不在管道上等。

    :raises SettingsError: 它是链接，不是文件，属于别人，或者别人写得了。
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SettingsError(
            f"cannot use {path} ({error.strerror}): remove it if it is not yours, or {_ADVICE}"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or _others_write(status):
        os.close(descriptor)
        raise SettingsError(f"{path} is not a file that only you can write: remove it, or {_ADVICE}")
    if status.st_mode & 0o077:
        os.fchmod(descriptor, 0o600)
    return descriptor


def read_private_file(path: Path) -> str:
    """:raises FileNotFoundError: 没有这个文件。"""
    with os.fdopen(open_private_file(path, os.O_RDONLY), encoding="utf-8") as file:
        return file.read()


def append_private_file(path: Path) -> IO[bytes]:
    return os.fdopen(open_private_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def write_private_file(path: Path, text: str) -> None:
    """整个替换，读者只会看到旧的或新的，断电以后也是；权限 0600。"""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    # O_EXCL：别人抢先放在这里的文件或链接，不会被当作自己的写进去
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # 改名之前落盘：不然断电以后，新名字下可能是个空文件
        os.fsync(file.fileno())
    fresh.replace(path)


def read_or_create_secret(path: Path) -> str:
    """一个随机口令，第一次用到时生成。只含十六进制数字，放进 URL 与配置文件都不用转义。

    :raises SettingsError: 文件是空的：服务器会让谁都不用口令就进来，或者谁也进不来。
    """
    try:
        secret = read_private_file(path)
    except FileNotFoundError:
        write_private_file(path, secrets.token_hex(24))
        secret = read_private_file(path)
    if not secret.strip():
        raise SettingsError(
            f"{path} is empty: put the password back that was in it (remove it only if it was never used)"
        )
    return secret


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """文件夹里 `lock` 文件上的 flock；进程无论怎样结束，内核都会放开。

    :raises SettingsError: 别的进程正在使用这个文件夹。
    """
    with os.fdopen(open_private_file(folder / "lock", os.O_RDWR | os.O_CREAT), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"another process is using the state folder {folder}: stop it first, or choose another one with --state-dir"
            ) from error
        yield
