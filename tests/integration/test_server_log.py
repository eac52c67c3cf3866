"""基准数的语句：服务器写进日志的，一个进程的，从领取到运行 SUCCESS。"""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from benchmarks.growth.server_log import ServerLog, Statements
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres

_TABLES = """
    CREATE SCHEMA etl;
    CREATE TABLE etl.leases (run_id text, expires_at int);
    CREATE TABLE runs (status text);
"""


def test_only_what_lies_between_claim_and_success_counts(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "server", durable=False) as url:
        connections = [psycopg.connect(url, application_name=name) for name in ("etl", "etl", "dagster")]
        data, heartbeat, dagster = connections
        for connection in connections:
            connection.autocommit = True
        data.execute(_TABLES)
        log = ServerLog(tmp_path / "server")
        data.execute("SELECT 'not recorded'")
        with log.recording():
            start = log.size()
            data.execute("SELECT 'beside'")
            beside = log.texts(start, os.getpid())
            data.execute("SELECT 'before'")
            data.execute("SELECT 'lock';\n INSERT INTO etl.leases VALUES ('run', 1)")
            heartbeat.execute("UPDATE etl.leases SET expires_at=2")
            dagster.execute("INSERT INTO runs VALUES ('STARTED')")
            data.execute("SELECT 'beside'")
            with data.transaction(), data.transaction():
                data.execute("\n  SELECT %s,\n 2", [1])
            dagster.execute("UPDATE runs SET status='SUCCESS'")
            data.execute("SELECT 'after'")
        assert log.count(start, os.getpid(), beside) == Statements(data=2, data_transactions=4, dagster=2)
        with pytest.raises(RuntimeError, match="no claim"):
            log.count(log.size(), os.getpid(), beside)
        for connection in connections:
            connection.close()
