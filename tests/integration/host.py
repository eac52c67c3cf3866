"""一台机器上的监听器与工人，真的进程；Dagster 的存储与数据在同一个数据库里。"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)


def host_environment(engine: sa.Engine, nats_url: str, folder: Path) -> dict[str, str]:
    """它们的环境变量；Dagster 的表建好了。"""
    database_url = engine.url.render_as_string(hide_password=False)
    made = {
        "ETL_DATABASE_URL": database_url,
        "ETL_NATS_URL": nats_url,
        "ETL_STATE_DIR": str(folder / "state"),
        "ETL_LEASE_SECONDS": "3",
        "DAGSTER_HOME": str(folder / "home"),
        "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(database_url),
    }
    write_dagster_home(folder / "home")
    environment = {**os.environ, **made}
    create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=environment, log_path=folder / "migrate.log")
    return made


def eventually(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """等到它是真的；还没有人应答的不算错。"""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextmanager
def running(command: list[str], *, environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def etl(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "bridge.cli.main", *arguments]
