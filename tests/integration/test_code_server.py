"""网页上的分区从有数据的那一年起；数据来得更早，代码服务器停下重起，工人照样做。"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.runs.worker import RunWorker
from etl_assets.core.business_day import first_shown_day
from etl_assets.core.database_sync import transact
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.orchestration.daily_asset import daily_partitions
from etl_assets.reports.reports import oldest_day
from etl_assets.testing.raw_data import RawData

from .warm_runs import announce

_CODE_SERVER = """
from bridge.warm_dagster import code_server
code_server._LOOK_SECONDS = 0.5
code_server.main()
"""


@contextmanager
def code_server(settings: EtlSettings, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """真的代码服务器，应答着了，半秒看一眼数据从哪天起。"""
    port = find_free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _CODE_SERVER,
            "api",
            "grpc",
            "--port",
            str(port),
            "--module-name",
            "etl_assets.definitions",
        ],
        env={**inherited, "ETL_DATABASE_URL": settings.database_url, "DAGSTER_HOME": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with server:
        try:
            deadline = time.monotonic() + 120
            while not answers(port):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield server
        finally:
            server.kill()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.parametrize(
    ("oldest", "shown"),
    [(date(2026, 3, 20), date(2026, 1, 1)), (date(1990, 5, 1), date(2000, 1, 1)), (date(9999, 1, 1), None)],
)
def test_days_shown_begin_with_the_year_of_the_data_and_hold_yesterday(oldest: date, shown: date | None) -> None:
    settings = EtlSettings()
    expected = shown or date(
        settings.today().year if settings.today().timetuple().tm_yday > 1 else settings.today().year - 1, 1, 1
    )
    first = first_shown_day(settings, oldest)
    assert first == expected
    partitions = daily_partitions(settings.model_copy(update={"shown_since": first}))
    assert partitions.get_first_partition_key() == str(first)
    assert daily_partitions(settings).get_first_partition_key() == "2000-01-01"


def test_older_data_are_made_by_workers_and_stop_the_code_server_so_that_it_shows_them(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{"ordered_at": datetime(2026, 3, 5, 4, tzinfo=UTC)}]))
    assert transact(engine, oldest_day, "public") == date(2026, 3, 5)
    with code_server(etl_settings, tmp_path) as server:
        assert server.poll() is None
        announce(engine, etl_settings, raw_data.add_import([{"ordered_at": datetime(2019, 3, 5, 4, tzinfo=UTC)}]))
        output, _ = server.communicate(timeout=120)
    assert server.returncode == 0, output
    assert "loading the code again" in output
    assert "2019-01-01" in output
    while (claim := worker.claim()) is not None:
        assert worker.execute(worker.start(claim)).succeeded
    orders = sa.text("SELECT min(order_date) FROM orders")
    with engine.connect() as connection:
        assert connection.scalar(orders) == date(2019, 3, 5)


@pytest.mark.parametrize(
    "environment", [{"ETL_PARTITIONS_START": "1997-01-01"}, {"ETL_DATABASE_URL": "postgresql://127.0.0.1:1/none"}]
)
def test_start_that_somebody_chose_stays_and_a_missing_database_is_no_obstacle(
    raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    with code_server(etl_settings, tmp_path, **environment) as server:
        announce(engine, etl_settings, raw_data.add_import([{}]))
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(timeout=4)
