"""Ctrl-C 在任何时刻：三秒之内一句话、退出码 130，服务器上什么也不留下。"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import LiteralString
from uuid import uuid4

import polars as pl
import psycopg
import pytest
from hypothesis import settings

from bridge.events.streams import ensure_event_streams
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.embedded.child_process import running_pids

from .conftest import NatsServer

MOMENTS = 200 if settings().max_examples > 50 else 12
ROWS = 300_000
LONGEST_SECONDS = 3.0
NOTHING = "aborted, nothing was imported"
IS_IN = re.compile(
    r"import (\S+) is in raw_orders (but was not announced: a running listener finds it after about 60 s; "
    r"at once: etl publish events.data_import.completed '.*'|and was announced)"
)
DAY = date(2026, 3, 2)


@dataclass(frozen=True)
class Ended:
    """一个被打断的命令是怎样结束的；seconds 是从信号到结束。"""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Etl:
    """真的进程里的命令，与它们的数据库。"""

    def __init__(self, etl_settings: EtlSettings, nats_url: str, state_dir: Path) -> None:
        self._url = etl_settings.database_url.replace("+psycopg", "")
        self.connection = self.connect(autocommit=True)
        self._started: list[subprocess.Popen[str]] = []
        self._environment = {
            **os.environ,
            "ETL_DATABASE_URL": etl_settings.database_url,
            "ETL_NATS_URL": nats_url,
            "ETL_STATE_DIR": str(state_dir),
        }

    def connect(self, *, autocommit: bool = False) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self._url, autocommit=autocommit, application_name="test")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bridge.cli.main", *arguments]
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """失败了的测试也不留下进程。"""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        self.connection.close()

    def interrupt(
        self, process: subprocess.Popen[str], *, number: signal.Signals = signal.SIGINT, again_after: float = 0
    ) -> Ended:
        """:param again_after: 大于 0 时，过这么多秒再来一次。"""
        started = time.monotonic()
        process.send_signal(number)
        if again_after:
            time.sleep(again_after)
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)
        return Ended(process.returncode, stdout, stderr, time.monotonic() - started)

    def count(self, query: LiteralString, *parameters: object) -> int:
        (number,) = self.connection.execute(f"SELECT count(*)::int FROM {query}", parameters).fetchone() or (0,)  # noqa: S608
        assert isinstance(number, int)
        return number

    def sessions(self, *, waiting_for_a_lock: bool = False) -> int:
        """命令在服务器上的会话。"""
        return self.count(
            "pg_stat_activity WHERE datname = current_database() AND application_name = 'etl' AND (wait_event_type = 'Lock' OR NOT %s)",
            waiting_for_a_lock,
        )

    def wait_for_session(self, process: subprocess.Popen[str], *, waiting_for_a_lock: bool = False) -> None:
        """这个命令连上了、在等锁了。"""
        deadline = time.monotonic() + 120
        while not self.sessions(waiting_for_a_lock=waiting_for_a_lock):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_until_nothing_is_left(self) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while self.sessions():
            assert time.monotonic() < deadline, self.connection.execute(
                "SELECT query, state FROM pg_stat_activity"
            ).fetchall()
            time.sleep(0.02)


@pytest.fixture
async def etl(etl_settings: EtlSettings, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Etl]:
    bridge_settings = BridgeSettings(nats_url=nats_server.url)
    async with JetStreamConnection(bridge_settings, name="test") as connection:
        await ensure_event_streams(connection, bridge_settings, [DATA_IMPORT_COMPLETED])
    made = Etl(etl_settings, nats_server.url, tmp_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _ctrl_c_reaches_the_commands() -> Iterator[None]:
    """后台的 shell 起的测试忽略 SIGINT，子进程会照样忽略。"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_until_python_is_up(process: subprocess.Popen[str]) -> None:
    """解释器自己起来的几十毫秒里，信号还归它管。"""
    caught = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.partition("SigCgt:\t")[2].split()[0], 16) & caught:
            return
        time.sleep(0.005)


def write_orders(path: Path, rows: int) -> Path:
    numbers = pl.int_range(rows, eager=True)
    pl.DataFrame(
        {
            "order_id": "A" + numbers.cast(pl.String),
            "shop": pl.repeat("店", rows, eager=True),
            "customer_name": "客户" + (numbers % 9_000).cast(pl.String),
            "order_status": pl.repeat("completed", rows, eager=True),
            "amount": (numbers % 500).cast(pl.String) + ".50",
            "quantity": pl.repeat("1", rows, eager=True),
            "ordered_at": pl.Series([f"{DAY + timedelta(days=n % 90)} 09:30:00" for n in range(rows)]),
        }
    ).write_csv(path)
    return path


@pytest.mark.timeout(3_000)
def test_an_import_is_aborted_at_any_moment(etl: Etl, tmp_path: Path) -> None:
    file = write_orders(tmp_path / "orders.csv", ROWS)
    chance = random.Random(20)  # noqa: S311
    started = time.monotonic()
    whole = etl.start("import", str(file))
    assert whole.communicate() is not None
    assert whole.returncode == 0
    lasts = time.monotonic() - started
    seen: dict[str, list[float]] = {"nothing": [], "in": [], "over": []}
    for number in range(MOMENTS):
        etl.connection.execute("TRUNCATE raw_orders, import_tasks")
        started = time.monotonic()
        process = etl.start("import", str(file))
        moment = 0.1 + (number + chance.random()) / MOMENTS * (lasts - 0.1)
        time.sleep(max(0, started + moment - time.monotonic()))
        wait_until_python_is_up(process)
        ended = etl.interrupt(process, again_after=chance.choice([0, 0.02, 0.3]))
        etl.wait_until_nothing_is_left()
        rows, imports = etl.count("raw_orders"), etl.count("import_tasks")
        if ended.stderr.strip() == NOTHING:
            assert (ended.code, ended.stdout, rows, imports) == (130, "", 0, 0), (moment, ended)
            seen["nothing"].append(ended.seconds)
        elif ended.code == 130:
            said = IS_IN.fullmatch(ended.stderr.strip().splitlines()[-1])
            assert said, (moment, ended)
            assert (rows, imports) == (ROWS, 1), (moment, ended)
            assert etl.count("import_tasks WHERE import_id = %s AND status = 'completed'", said[1]) == 1
            seen["in"].append(ended.seconds)
        else:
            assert (ended.code, rows, imports) == (0, ROWS, 1), (moment, ended)
            seen["over"].append(ended.seconds)
        assert "Traceback" not in ended.stderr
        assert ended.seconds < LONGEST_SECONDS, (moment, ended)
    times = sorted(seen["nothing"])
    assert times, seen
    print(  # noqa: T201  # 深的形式里看分布
        {kind: len(found) for kind, found in seen.items()},
        *(f"{times[int(share * (len(times) - 1))]:.2f}" for share in (0, 0.5, 0.9, 0.99, 1)),
    )


def test_sigterm_says_the_same(etl: Etl, tmp_path: Path) -> None:
    file = write_orders(tmp_path / "orders.csv", ROWS)
    process = etl.start("import", str(file))
    etl.wait_for_session(process)
    ended = etl.interrupt(process, number=signal.SIGTERM)
    assert (ended.code, ended.stderr) == (143, f"{NOTHING}\n")
    etl.wait_until_nothing_is_left()


def test_nothing_is_left_beside_an_aborted_file(etl: Etl, tmp_path: Path) -> None:
    file = write_orders(tmp_path / "orders.csv", 1_000)
    file.write_text(file.read_text().replace("A7,店,客户7,completed,7.50", "A7,店,客户7,completed,no number", 1))
    with etl.connect() as holder:
        holder.execute("LOCK TABLE shop_configs IN ACCESS EXCLUSIVE MODE")  # COPY 之后、提交之前
        process = etl.start("import", str(file), "--skip-bad-rows")
        etl.wait_for_session(process, waiting_for_a_lock=True)
        ended = etl.interrupt(process)
        assert (ended.code, ended.stderr) == (130, f"{NOTHING}\n")
        etl.wait_until_nothing_is_left()
    assert [path.name for path in tmp_path.glob("orders*")] == ["orders.csv"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--left", "public", "--right", "shadow"],
        ["doctor"],
        ["imports"],
        ["init-db"],
        ["replay", "--since", "2h"],
        ["show", "orders"],
        ["backfill", "--from", str(DAY), "--to", str(DAY)],
        ["status"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_waits_for_the_database_is_aborted(etl: Etl, arguments: list[str]) -> None:
    etl.connection.execute("CREATE SCHEMA shadow")
    for table in target_tables("public").of_asset.values():
        etl.connection.execute(f"CREATE VIEW shadow.{table.name} AS TABLE public.{table.name}")
    with etl.connect() as holder:
        holder.execute("LOCK TABLE orders, import_tasks, etl.assets, etl.schema_version IN ACCESS EXCLUSIVE MODE")
        process = etl.start(*arguments)
        etl.wait_for_session(process, waiting_for_a_lock=True)
        ended = etl.interrupt(process)
        asks = arguments[0] in ("backfill", "replay")
        assert (ended.code, ended.stderr.splitlines()[-1:]) == (
            130,
            ["aborted; `etl status` shows what is due" if asks else "aborted"],
        ), ended
        assert ended.seconds < LONGEST_SECONDS
        assert "Traceback" not in ended.stderr
        etl.wait_until_nothing_is_left()


def test_building_an_index_is_aborted_and_goes_on_later(etl: Etl) -> None:
    etl.connection.execute("DROP INDEX ix_import_tasks_completed_at")
    with etl.connect() as holder:
        holder.execute("SELECT FROM import_tasks")  # CONCURRENTLY 等更早的事务
        holder.execute("LOCK TABLE import_tasks IN SHARE UPDATE EXCLUSIVE MODE")
        process = etl.start("init-db", "--create-indexes")
        etl.wait_for_session(process, waiting_for_a_lock=True)
        ended = etl.interrupt(process)
        assert ended.code == 130, ended
        assert (
            ended.stderr == "aborted: run `etl init-db --create-indexes` again: it drops what is INVALID and goes on\n"
        )
        etl.wait_until_nothing_is_left()
    again = etl.start("init-db", "--create-indexes")
    assert again.communicate()[0].endswith("built 1 indexes\n")


@pytest.mark.parametrize("command", ["wait", "backfill"])
def test_waiting_for_the_workers_is_aborted(etl: Etl, command: str) -> None:
    import_id = uuid4()
    etl.connection.execute("INSERT INTO import_tasks VALUES (%s, 'a.csv', 'completed', 0, now(), now())", [import_id])
    arguments = {"wait": ["--import-id", str(import_id)], "backfill": ["--from", str(DAY), "--to", str(DAY)]}[command]
    process = etl.start(command, *arguments)
    etl.wait_for_session(process)
    time.sleep(1)
    assert process.poll() is None
    ended = etl.interrupt(process)
    assert (ended.code, ended.seconds < LONGEST_SECONDS) == (130, True), ended
    assert ended.stderr.splitlines() == [
        {
            "wait": "stopped waiting; the workers go on",
            "backfill": f"stopped waiting; {DAY} is due and the workers go on: see `etl status`",
        }[command]
    ]
    etl.wait_until_nothing_is_left()


@pytest.mark.timeout(600)
def test_the_demo_is_aborted_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(20)  # noqa: S311
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for until in ("", "Starting", "The stack is up", "Imported"):
        with subprocess.Popen(
            [sys.executable, "-m", "bridge.cli.main", "demo"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait_until_python_is_up(process)
            assert process.stdout is not None
            while until and not process.stdout.readline().startswith(until):
                assert process.poll() is None
            time.sleep(chance.random() * 3)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (130, "aborted\n"), until
        assert time.monotonic() - started < LONGEST_SECONDS, until
        deadline = time.monotonic() + 30
        while left := [
            *tmp_path.glob("etl-demo-*"),
            *(pid for pid in running_pids() if str(tmp_path).encode() in environment_of(pid)),
        ]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
