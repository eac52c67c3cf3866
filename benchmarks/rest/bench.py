"""`pdm run bench rest`：什么也不做时，`etl up` 占多少内存、多少 CPU，几秒就绪；原样的 `dagster dev` 又是多少。

轮流起一边，等它静下来，量一分钟，停下，再起另一边：同时起着，两边共用的页各只算一半。
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

import click as cli
from rich.console import Console
from rich.table import Table

from benchmarks.processes import Usage, usage_below
from benchmarks.report import Bar, Spread, print_bars, write_results
from bridge.warm_dagster.code_location_name import CODE_MODULE
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.embedded.loopback_port import find_free_port

_PATIENCE_SECONDS = 300
_STOP_SECONDS = 60
_ROLES = {
    "PostgreSQL": r"postgres",
    "NATS": r"nats-server",
    "what the others are forked from": r"fork_template",
    "code server": r"code_server|api grpc|code-server",
    "webserver": r"webserver",
    "daemon": r"_daemon|warm_dagster\.daemon",
    "workers": r"main worker",
    "listener": r"main listen",
    "the command": r" up | dev ",
}
"""命令行里有这些字的进程；从上往下，头一个合的。"""


@dataclass(frozen=True)
class Rest:
    """一边的一轮：几秒就绪，到那时用了多少 CPU 秒；各种进程静下来以后用的，CPU 是那一分钟里占一个核的几分之几。"""

    ready_seconds: float
    ready_cpu_seconds: float
    roles: Mapping[str, Usage]

    @property
    def total(self) -> Usage:
        return sum(self.roles.values(), Usage())


Side = Callable[[Path], AbstractContextManager[tuple[int, float]]]


@cli.command()
@cli.option("--rounds", default=2, show_default=True, type=cli.IntRange(1, 20), help="Rounds of each side.")
@cli.option("--settle", default=30.0, show_default=True, help="Seconds from ready until it is measured.")
@cli.option("--seconds", default=60.0, show_default=True, help="Seconds of idleness that are measured.")
def bench_rest(rounds: int, settle: float, seconds: float) -> None:
    """Memory, CPU and start of the idle stack, beside stock `dagster dev` with the same assets."""
    sides: dict[str, Side] = {"etl up": _product, "dagster dev": _stock}
    rests: dict[str, list[Rest]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory(prefix="bench-") as folder, side(Path(folder)) as (pid, ready_seconds):
                spent = sum(used.cpu_seconds for used in usage_below(pid, _role_of).values())
                time.sleep(settle)
                rests[name].append(Rest(ready_seconds, spent, _measure(pid, seconds)))
    _print(rests)
    bars = [
        Bar(f"{what} of etl up", _ratio(value, *rests.values()), "times dagster dev's", limit, "most")
        for what, value, limit in (
            ("memory at rest (PSS)", _memory, 1.5),
            ("CPU at rest", _cpu, 1.75),
            ("CPU until ready", _ready_cpu, 1.5),
        )
    ]
    print_bars(bars)
    write_results("rest", bars, {"rounds": {name: list(map(asdict, of_side)) for name, of_side in rests.items()}})
    sys.exit(not all(bar.ok for bar in bars))


def _memory(rest: Rest) -> float:
    return rest.total.pss_bytes


def _cpu(rest: Rest) -> float:
    return rest.total.cpu_seconds


def _ready(rest: Rest) -> float:
    return rest.ready_seconds


def _ready_cpu(rest: Rest) -> float:
    return rest.ready_cpu_seconds


def _median(value: Callable[[Rest], float], rests: list[Rest]) -> float:
    return Spread.of(list(map(value, rests))).median


def _ratio(value: Callable[[Rest], float], ours: list[Rest], stock: list[Rest]) -> float:
    return _median(value, ours) / _median(value, stock)


def _measure(pid: int, seconds: float) -> dict[str, Usage]:
    before, started = usage_below(pid, _role_of), time.monotonic()
    time.sleep(seconds)
    after, elapsed = usage_below(pid, _role_of), time.monotonic() - started
    return {
        role: Usage(
            used.processes, used.pss_bytes, (used.cpu_seconds - before.get(role, Usage()).cpu_seconds) / elapsed
        )
        for role, used in after.items()
    }


def _role_of(command: str) -> str:
    return next((role for role, words in _ROLES.items() if re.search(words, command)), "others")


@contextmanager
def _product(folder: Path) -> Iterator[tuple[int, float]]:
    """`etl up` 的缺省设置，在新的文件夹里。"""
    command = [*_module("bridge.cli.main", "up"), "--state-dir", str(folder / "state"), "--port", str(find_free_port())]
    started = time.monotonic()
    with _running(command, folder, {}) as process:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("ready"):
            sys.exit(f"etl up did not start: {(folder / 'log').read_text()[-2000:]}")
        yield process.pid, time.monotonic() - started


@contextmanager
def _stock(folder: Path) -> Iterator[tuple[int, float]]:
    """它的文档所说的：一个自己的 DAGSTER_HOME，`dagster dev -m`。数据库在外面，不算它的。"""
    port = find_free_port()
    home = folder / "home"
    home.mkdir()
    with EmbeddedPostgres(folder / "postgres") as database_url:
        environment = {"DAGSTER_HOME": str(home), "ETL_DATABASE_URL": database_url, "DAGSTER_DISABLE_TELEMETRY": "1"}
        command = _module("dagster", "dev", "-m", CODE_MODULE, "-h", "127.0.0.1", "-p", str(port))
        started = time.monotonic()
        with _running(command, folder, environment) as process:
            while not _answers(f"http://127.0.0.1:{port}/server_info"):
                if process.poll() is not None or time.monotonic() > started + _PATIENCE_SECONDS:
                    sys.exit(f"dagster dev did not start: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield process.pid, time.monotonic() - started


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", name, *arguments]


@contextmanager
def _running(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """在缺省的设置里跑一个命令，Ctrl-C 停下它。"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**inherited, **environment},
            cwd=folder,
            text=True,
            start_new_session=True,
        )
    try:
        with process:
            yield process
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=_STOP_SECONDS)
    finally:
        process.kill()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:  # noqa: S310  # 地址由我们拼成，只指向本机
            return bool(response.status == 200)
    except OSError:
        return False


def _print(rests: Mapping[str, list[Rest]]) -> None:
    for name, of_side in rests.items():
        middle = sorted(of_side, key=_memory)[len(of_side) // 2]
        title = f"{name}: ready after {_median(_ready, of_side):.1f} s, {_median(_ready_cpu, of_side):.1f} s of CPU"
        table = Table("process", "number", "memory (PSS)", "CPU, % of a core", title=title, title_justify="left")
        for role, used in [*sorted(middle.roles.items(), key=lambda each: -each[1].pss_bytes), ("all", middle.total)]:
            table.add_row(
                role, str(used.processes), f"{used.pss_bytes / 2**20:.0f} MiB", f"{100 * used.cpu_seconds:.2f}"
            )
        Console().print(table)
