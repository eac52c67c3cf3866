"""量一次调用：墙钟、峰值内存、WAL。每一方在自己的进程里，先热身，像常驻的工人那样。"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

_RESET_PEAK = "5"
"""写进 /proc/self/clear_refs：把 VmHWM 降到此刻的用量。见 proc(5)。"""


@dataclass(frozen=True)
class Measurement:
    seconds: float
    peak_rss_bytes: int
    wal_bytes: int


class Side:
    """参加比较的一方：一个一直活着的进程，一次做一件事。"""

    def __init__(self) -> None:
        self._process = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """不计时地做一次。"""
        self._process.submit(function, *arguments).result()

    def measure(self, engine: sa.Engine, function: Callable[..., Any], *arguments: Any) -> Measurement:
        before = _wal_position(engine)
        seconds, peak_rss_bytes = self._process.submit(_timed, function, *arguments).result()
        return Measurement(seconds=seconds, peak_rss_bytes=peak_rss_bytes, wal_bytes=_wal_position(engine) - before)

    def stop(self) -> None:
        self._process.shutdown()


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, int]:
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    started = time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return seconds, int(peak.split()[1]) * 1024


def _wal_position(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn() - '0/0'").scalar_one())
