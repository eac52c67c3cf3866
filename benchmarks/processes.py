"""本进程起的各个进程用了多少 CPU，取自 /proc。"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[str, float]:
    """子孙进程至今的 CPU 秒，按程序名；结束了的算在它父进程头上，本进程自己不算。"""
    parents: dict[int, int] = {}
    spent: dict[int, tuple[str, float]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # 刚刚结束
                head, _, tail = (folder / "stat").read_text().rpartition(")")
                fields = tail.split()
                parents[int(folder.name)] = int(fields[1])
                spent[int(folder.name)] = (head.partition("(")[2], sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_SECOND)
    by_program: dict[str, float] = defaultdict(float)
    for pid, (program, seconds) in spent.items():
        if pid != os.getpid() and _descends(pid, parents):
            by_program[program] += seconds
    return dict(by_program)


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()
