"""子进程的第一步（单独运行的脚本，只用标准库）：换账户、约定随父进程死，再换成真正的程序。

不用 subprocess 的 preexec_fn：多线程进程里在 fork 与 exec 之间运行 Python 可能死锁，Python 3.12 起还会告警。
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, death_signal: int, account: str, program: list[str]) -> None:
    """:param account: `uid:gid`，空串表示不换。"""
    if account:
        uid, _, gid = account.partition(":")
        # 次序要紧：setuid 之后就没有权限再改组
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    # 换账户会清掉这个约定，所以排在其后
    if die_with(parent_pid, death_signal):
        os.execv(program[0], program)  # noqa: S606 这正是要做的事：不经过 shell


def die_with(parent_pid: int, death_signal: int) -> bool:
    """约定本进程随父进程死；父进程在约定之前就死了、信号不会再来，是 False。"""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal) != 0:
        sys.exit("cannot ask the kernel for a signal at the parent's death")
    return os.getppid() == parent_pid


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
