"""子进程：启动时就约定随父进程死；以（pid、启动时刻）认出一个进程，不会错认被重用的 pid。"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

_LAUNCHER = Path(__file__).with_name("child_launcher.py")
ORPHANED = signal.SIGUSR2
"""父进程的死讯，给要分清它与 SIGTERM 的子进程：那一刻 getppid 也许还没有变（父进程的主线程死了，别的线程还没死完）。

不用 SIGHUP：终端关了也发它，而 `nohup` 要它不算数。
"""
_START_TIME_FIELD = 19  # /proc/<pid>/stat 里 comm 之后的第 20 项：启动时刻，单位是时钟滴答


class ChildProcess(Protocol):
    """本进程的一个子进程：subprocess 启动的，或者过继来的。"""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True)
class ProcessIdentity:
    """一个进程；同一次开机之内不会有第二个与它相等。"""

    pid: int
    started_ticks: int

    def is_alive(self) -> bool:
        return identify(self.pid) == self


def with_launcher(
    argv: Sequence[str], *, death_signal: signal.Signals, account: pwd.struct_passwd | None = None
) -> list[str]:
    """在命令前面加上启动器。父进程里启动它的那个 *线程* 结束时，子进程收到 `death_signal`。"""
    owner = f"{account.pw_uid}:{account.pw_gid}" if account else ""
    return [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(int(death_signal)), owner, *argv]


def launch(
    argv: Sequence[str],
    log: IO[bytes],
    *,
    env: Mapping[str, str],
    death_signal: signal.Signals = signal.SIGKILL,
    account: pwd.struct_passwd | None = None,
    inherited_fds: Sequence[int] = (),
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """启动一个自成会话（也就自成进程组）的子进程，输出都进 `log`。"""
    return subprocess.Popen(
        with_launcher(argv, death_signal=death_signal, account=account),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=dict(env),
        cwd=folder,
        pass_fds=tuple(inherited_fds),
        start_new_session=True,
    )


def identify(pid: int) -> ProcessIdentity | None:
    """这个 pid 现在是谁；不存在或已是僵尸则为 None。"""
    fields = _stat_fields(pid)
    return ProcessIdentity(pid, int(fields[_START_TIME_FIELD])) if fields else None


def session_members(session_id: int) -> Iterator[ProcessIdentity]:
    """一个会话里还活着的进程。"""
    for pid in running_pids():
        fields = _stat_fields(pid)
        if fields and fields[3] == str(session_id):
            yield ProcessIdentity(pid, int(fields[_START_TIME_FIELD]))


def running_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def send_signal(pid: int, number: signal.Signals) -> None:
    """发信号；进程已经不在就算了。"""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def send_group_signal(group_id: int, number: signal.Signals) -> None:
    """给整个进程组发信号；组里已经没有进程就算了。"""
    with suppress(ProcessLookupError):
        os.killpg(group_id, number)


def has_exited(process: ChildProcess) -> bool:
    """子进程结束了没有；不收尸，所以它的 pid（也是组号）暂时不会被重用。"""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/<pid>/stat 里 comm 之后的各项：状态、父进程、组、会话……；comm 自己可能含空格与括号。不在了、已是僵尸的是 None。"""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields
