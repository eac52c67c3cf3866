"""栈的守护进程：闲着时一遍遍地看，用的是开着的连接；停下时不留话。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy as sa

from .warm_postgres import dagster_on_postgres

# 由服务器数，每几秒才写下
COUNTS = sa.text("SELECT sessions, xact_commit FROM pg_stat_database WHERE datname = current_database()")
LOOKS = 40
NEW_CONNECTIONS = 5


def test_idle_daemon_looks_through_connections_that_it_keeps(engine: sa.Engine, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace.yaml"
    workspace.write_text(json.dumps({"load_from": []}))
    with (
        dagster_on_postgres(engine, tmp_path),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        (tmp_path / "log").open("wb") as log,
    ):
        command = [sys.executable, "-P", "-m", "bridge.warm_dagster.daemon", str(workspace)]
        with subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log) as daemon:
            wait_for_looks(connection, daemon)  # 起来的时候
            opened = wait_for_looks(connection, daemon)
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(timeout=60) == 0
    assert opened <= NEW_CONNECTIONS
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert said
    assert [line["event"] for line in said if line["level"] not in ("info", "debug")] == []


def wait_for_looks(connection: sa.Connection, daemon: subprocess.Popen[bytes]) -> int:
    """等到别的会话又做了这么多事务；返回其间新开的连接。测试自己的一直开着。"""
    deadline, own = time.monotonic() + 180, 0
    before = now = connection.execute(COUNTS).one()
    while now.xact_commit < before.xact_commit + own + LOOKS:
        assert daemon.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
        connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
        own += 2
        now = connection.execute(COUNTS).one()
    return int(now.sessions - before.sessions)
