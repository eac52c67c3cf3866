"""NATS 或 PostgreSQL 走开一阵又回来：什么也不用人做，什么也没丢，同一句话一分钟只说一回。"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.demo.reference import find_differences
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.testing.databases import initialize_database
from etl_assets.testing.raw_data import RawData
from tests.chaos.installation import ROLES, Installation, running_installation
from tests.integration.conftest import NatsServer
from tests.other_sessions import end_other_sessions

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
KINDS = 4
"""一个进程里同一句话至多有几种：两条 NATS 连接，各有断开与连不上两种原因。"""


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """这个测试自己的服务器，可以停，再起来还是那个地址。"""
    server = EmbeddedPostgres(tmp_path / "postgres", durable=False)
    yield server
    server.stop()


@pytest.fixture
def installation(postgres: EmbeddedPostgres, nats_server: NatsServer, tmp_path: Path) -> Iterator[Installation]:
    commands = {role: [sys.executable, "-m", "bridge.cli.main", role] for role in ROLES}
    url = postgres.start()
    engine = build_engine(EtlSettings(database_url=url))
    initialize_database(engine)
    engine.dispose()
    with running_installation(tmp_path, database_url=url, nats_url=nats_server.url, commands=commands) as installation:
        yield installation


@contextmanager
def sparing_words(installation: Installation, seconds: float) -> Iterator[None]:
    """期间每个进程的每句警告说得不多，进程也没有换过。"""
    before = {role: len(installation.log(role)) for role in ROLES}
    pids = {role: process.pid for role, process in installation.processes.items()}
    yield
    for role in ROLES:
        lines = [
            json.loads(line) for line in installation.log(role)[before[role] :].splitlines() if line.startswith("{")
        ]
        said = Counter(line["message"] for line in lines if line["level"] in ("warning", "error"))
        assert said, f"{role} says nothing about the outage"
        assert max(said.values()) <= KINDS * (seconds // 60 + 1), (role, said)
    assert {role: process.pid for role, process in installation.processes.items() if process.poll() is None} == pids


@pytest.mark.timeout(1_200)
def test_servers_that_go_away_and_come_back_need_nobody(
    installation: Installation, postgres: EmbeddedPostgres, nats_server: NatsServer, is_deep: bool
) -> None:
    seconds = 300 if is_deep else 8
    raw_data = RawData(installation.engine)
    orders = [{"order_id": f"A-{day}", "ordered_at": FIRST + timedelta(days=day)} for day in range(3)]
    before, during_nats, during_postgres = (raw_data.add_import([order]) for order in orders)
    installation.announce(before)
    installation.eventually(lambda: installation.is_done(before), "the first import is not in the tables")

    with sparing_words(installation, seconds):
        nats_server.stop()
        time.sleep(seconds)
        nats_server.start()
        installation.announce(during_nats)
        installation.eventually(lambda: installation.is_done(during_nats), "not in the tables after NATS came back")

    with sparing_words(installation, seconds):
        postgres.stop()
        installation.announce(during_postgres)
        time.sleep(seconds)
        postgres.start()
        installation.eventually(
            lambda: installation.is_done(during_postgres), "not in the tables after PostgreSQL came back"
        )

    assert find_differences(installation.engine, installation.settings) == []
    assert installation.unfinished_runs() == []


def test_read_only_window_buries_no_event_and_holds_no_day(installation: Installation) -> None:
    """受管的切换、磁盘看守会这样做（25006）：事件与日子等着，改回来就自己做完。"""
    raw_data = RawData(installation.engine)
    orders = [{"order_id": f"A-{day}", "ordered_at": FIRST + timedelta(days=day)} for day in range(3)]
    before, on_the_way, during = (raw_data.add_import([order]) for order in orders)
    installation.announce(before)
    installation.eventually(lambda: installation.is_done(before), "the first import is not in the tables")
    pids = {role: process.pid for role, process in installation.processes.items()}

    installation.announce(on_the_way)
    set_read_only(installation, "on")
    installation.announce(during)
    time.sleep(6)
    set_read_only(installation, "off")
    for import_id in (on_the_way, during):
        installation.eventually(
            lambda import_id=import_id: installation.is_done(import_id), "not done after the window", timeout_seconds=30
        )

    assert find_differences(installation.engine, installation.settings) == []
    with installation.engine.connect() as connection:
        counted = connection.exec_driver_sql(
            "SELECT count(*) FROM etl.ledger WHERE failures > 0 OR held_reason IS NOT NULL"
        )
        assert counted.scalar_one() == 0
    assert installation.unfinished_runs() == []
    assert {role: process.pid for role, process in installation.processes.items()} == pids
    refusals = [line for line in installation.log("listen").splitlines() if '"the database refuses, waiting"' in line]
    assert len(refusals) == 1
    assert "PostgreSQL is read-only" in refusals[0]
    assert not any("dead-lettered" in installation.log(role) for role in ROLES)


def set_read_only(installation: Installation, value: str) -> None:
    """新的会话才认这个设置，所以断开旧的。"""
    with installation.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        database = installation.engine.url.database
        connection.exec_driver_sql(f'ALTER DATABASE "{database}" SET default_transaction_read_only = {value}')
        end_other_sessions(connection)
    installation.engine.dispose()
