"""DAGSTER_POSTGRES_URL 的数据库还没有：doctor 说得出来，init-db 建它。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from bridge.stack.dagster_home import write_dagster_home
from etl_assets.core.settings import EtlSettings


@pytest.fixture
def dagster_url(engine: sa.Engine) -> Iterator[str]:
    url = engine.url.set(drivername="postgresql+psycopg2", database=f"dagster_{uuid4().hex[:12]}")
    yield url.render_as_string(hide_password=False)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {url.database}")


def test_missing_dagster_database_is_said_and_made(dagster_url: str, etl_settings: EtlSettings, tmp_path: Path) -> None:
    write_dagster_home(tmp_path / "home")
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_STATE_DIR": str(tmp_path),
        "DAGSTER_HOME": str(tmp_path / "home"),
        "DAGSTER_POSTGRES_URL": dagster_url,
    }

    def etl(*arguments: str) -> str:
        command = [sys.executable, "-m", "bridge.cli.main", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout

    def dagster() -> tuple[str, str]:
        (found,) = [finding for finding in json.loads(etl("doctor", "--json")) if finding["check"] == "dagster"]
        return found["state"], found["says"]

    state, says = dagster()
    assert state == "error"
    assert says.startswith(
        "the database that DAGSTER_POSTGRES_URL names is not there, create it or correct the address"
    )
    made = "created the database of DAGSTER_POSTGRES_URL"
    assert made in etl("init-db")
    assert dagster()[0] == "ok"
    assert made not in etl("init-db")
