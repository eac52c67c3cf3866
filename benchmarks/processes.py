"""进程用了多少 CPU、多少内存，取自 /proc。"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """几个进程合起来：内存是 PSS（共用的页各算一份），CPU 秒含结束了的子进程的。"""

    processes: int = 0
    pss_bytes: int = 0
    cpu_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.processes + other.processes, self.pss_bytes + other.pss_bytes, self.cpu_seconds + other.cpu_seconds
        )


@dataclass(frozen=True)
class _Process:
    program: str
    parent: int
    cpu_seconds: float


def cpu_seconds() -> dict[str, float]:
    """子孙进程至今的 CPU 秒，按程序名；结束了的算在它父进程头上，本进程自己不算。"""
    by_program: dict[str, float] = defaultdict(float)
    for process in _descendants(os.getpid()).values():
        by_program[process.program] += process.cpu_seconds
    return dict(by_program)


def usage_below(root: int, role_of: Callable[[str], str]) -> dict[str, Usage]:
    """一个进程与它的子孙此刻用着的，按 role_of(命令行)。"""
    by_role: dict[str, Usage] = defaultdict(Usage)
    everyone = _read_processes()
    for pid in (root, *_descendants(root)):
        with suppress(OSError, KeyError):  # 刚刚结束
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss_kib = next(int(line.split()[1]) for line in memory.splitlines() if line.startswith("Pss:"))
            by_role[role_of(f"{command} ")] += Usage(1, pss_kib << 10, everyone[pid].cpu_seconds)
    return dict(by_role)


def _descendants(root: int) -> dict[int, _Process]:
    everyone = _read_processes()

    def descends(pid: int) -> bool:
        while pid and pid != root:
            pid = everyone[pid].parent if pid in everyone else 0
        return pid == root

    return {pid: process for pid, process in everyone.items() if pid != root and descends(pid)}


def _read_processes() -> dict[int, _Process]:
    found: dict[int, _Process] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # 刚刚结束
                head, _, tail = (folder / "stat").read_text().rpartition(")")
                fields = tail.split()
                ticks = sum(int(field) for field in fields[11:15])
                found[int(folder.name)] = _Process(head.partition("(")[2], int(fields[1]), ticks / _TICKS_PER_SECOND)
    return found
