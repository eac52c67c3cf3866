"""应用自己建的表没有 init-db 的索引：init-db 印出语句，或者自己建；status、doctor 与起来的工人都说出来。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from bridge.cli.stack import init_db_command
from bridge.cli.status import status_command
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application_tables
from etl_assets.testing.databases import initialize_database
from tests.the_three import graph

from .commands import use_in_commands


@pytest.fixture(autouse=True)
def _installed(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """应用自己建的表：列都对，一个索引也没有。"""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA etl CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        for table in application_tables():
            table.create(connection)
        for index in (index for table in application_tables() for index in table.indexes):
            connection.execute(sa.schema.DropIndex(index))
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("bridge.runs.worker.get_engine", lambda: engine)
    monkeypatch.setattr("bridge.runs.worker.get_settings", lambda: etl_settings)
    use_in_commands(
        monkeypatch, engine=engine, settings=etl_settings, bridge_settings=BridgeSettings(nats_url="nats://127.0.0.1:1")
    )


def init_db(*arguments: str) -> Result:
    result = CliRunner().invoke(init_db_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_init_db_prints_statements_that_can_be_run_as_they_are(engine: sa.Engine) -> None:
    printed = init_db().output
    statements = [line.strip().removesuffix(";") for line in printed.splitlines() if line.startswith("  ")]
    assert "CREATE INDEX CONCURRENTLY ix_raw_orders_ordered_at ON public.raw_orders (ordered_at)" in statements
    assert "CREATE INDEX CONCURRENTLY ix_public_orders_order_date ON public.orders (order_date)" in statements
    assert sum(statement.startswith("CREATE INDEX CONCURRENTLY") for statement in statements) == 7
    assert "or run `etl init-db --create-indexes`" in printed
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    assert "INDEX" not in init_db().output


def test_init_db_creates_them_when_asked(engine: sa.Engine) -> None:
    assert init_db("--create-indexes").output.endswith("\nbuilt 7 indexes\n")
    assert init_db("--create-indexes").output.endswith("\nno index is missing\n")
    assert "INDEX" not in init_db().output
    with engine.connect() as connection:
        built = set(connection.scalars(sa.text("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")))
    assert built >= {index.name for table in application_tables() for index in table.indexes}


def test_status_and_a_worker_that_starts_say_that_they_are_missing(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize_database(engine, graph)

    def go_no_further() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("bridge.runs.worker.open_instance", go_no_further)

    def start() -> list[str]:
        with capture_logs() as logs, pytest.raises(KeyboardInterrupt):
            RunWorker.load(BridgeSettings())
        return [str(log) for log in logs if log["log_level"] == "warning"]

    def status() -> tuple[str, int]:
        printed, as_json = (CliRunner().invoke(status_command, arguments).output for arguments in ([], ["--json"]))
        return printed, len(json.loads(as_json)["indexes"])

    (warning,) = start()
    assert "public.raw_orders" in warning
    assert "`etl init-db` prints the statements" in warning
    printed, missing = status()
    assert "indexes: 7 are missing or INVALID" in printed
    assert missing == 7
    init_db("--create-indexes")
    assert (start(), status()[1]) == ([], 0)
    assert "indexes:" not in status()[0]
