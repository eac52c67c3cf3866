"""事件走的路上，每两步之间都杀一次：每个资产恰好提交一次，三个完成事件各送到一次，不用人管。"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from uuid import UUID

import nats
import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.events import DataImportCompleted
from bridge.events.publish import publish_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ETL_COMPLETED, EVENTS_STREAM
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import DAGSTER_SCHEMA, build_dagster_postgres_url, create_dagster_storage, write_dagster_home
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import leases, outbox
from etl_assets.services.ledger import ASSETS
from etl_assets.services.reports import import_progress
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import RawData
from tests.chaos.mortal import LISTENER_STEPS, STEPS
from tests.integration.conftest import NatsServer

REPOSITORY = Path(__file__).parents[2]
FIRST = date(2026, 1, 5)
DAILY_FORM = ("ledger asked", "days claimed", "orders committed", "run succeeded", "completion events published")
"""平日只杀这几处；`pdm run test-chaos` 处处都杀。"""


@dataclass
class Installation:
    """真的数据库、NATS、一个监听器、一个工人；死了的由 keep 补上，像看护者那样。"""

    engine: sa.Engine
    settings: EtlSettings
    nats_url: str
    environment: dict[str, str]
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]]

    def arm_file(self, role: str) -> Path:
        return self.folder / f"{role}.armed"

    def log(self, role: str) -> str:
        path = self.folder / f"{role}.log"
        return path.read_text() if path.exists() else ""

    def keep(self) -> None:
        for role in ("listen", "worker"):
            process = self.processes.get(role)
            if process is None or process.poll() is not None:
                command = [sys.executable, "-m", "tests.chaos.mortal", role, str(self.arm_file(role))]
                with (self.folder / f"{role}.log").open("ab") as log:
                    self.processes[role] = subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log)

    def eventually(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            self.keep()
            assert time.monotonic() < deadline, f"{what}\n" + self.log("listen")[-4000:] + self.log("worker")[-4000:]
            time.sleep(0.05)

    def is_done(self, import_id: UUID) -> bool:
        """数据在表里，租约放了，完成事件都发出去了。"""
        with self.engine.connect() as connection:
            progress = import_progress(connection, self.settings, import_id)
            left = [connection.scalar(sa.select(sa.func.count()).select_from(table)) for table in (leases, outbox)]
        return progress.handled and progress.done == progress.days and left == [0, 0]


@pytest.fixture(scope="module")
def installation(postgres_url: str, database_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("killed")
    server = NatsServer(folder)
    server.start()
    with cloned_database(postgres_url, database_template) as url:
        settings = EtlSettings(database_url=url)
        engine = build_engine(settings)
        write_dagster_home(folder / "home")
        environment = {
            **os.environ,
            "ETL_DATABASE_URL": url,
            "ETL_NATS_URL": server.url,
            "DAGSTER_HOME": str(folder / "home"),
            "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(url),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "ETL_LEASE_SECONDS": "3",
            "ETL_TASK_ACK_WAIT_SECONDS": "2",
            "ETL_EVENT_ACK_WAIT_SECONDS": "2",
        }
        create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=environment, log_path=folder / "migrate.log")
        made = Installation(engine, settings, server.url, environment, folder, {})
        made.eventually(lambda: all('"ready"' in made.log(role) for role in ("listen", "worker")), "the processes do not become ready")
        yield made
        for process in made.processes.values():
            process.kill()
            process.wait()
        engine.dispose()
    server.kill()


@pytest.fixture
def is_deep(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--hypothesis-profile") == "deep"


@pytest.mark.timeout(900)
def test_kill_between_any_two_steps_loses_and_doubles_nothing(installation: Installation, is_deep: bool) -> None:
    raw_data = RawData(installation.engine)
    for number, step in enumerate(STEPS if is_deep else DAILY_FORM):
        arm_file = installation.arm_file("listen" if step in LISTENER_STEPS else "worker")
        day = FIRST + timedelta(days=number)
        import_id = raw_data.add_import([{"order_id": f"A-{number}", "ordered_at": datetime(day.year, day.month, day.day, 4, tzinfo=UTC)}])
        arm_file.write_text(step)
        asyncio.run(announce(installation, import_id))
        installation.eventually(lambda armed=arm_file: not armed.exists(), f"nobody came past the step {step!r}")  # type: ignore[misc]
        installation.eventually(lambda done=import_id: installation.is_done(done), f"not in the tables after a kill at {step!r}")  # type: ignore[misc]
        made = asyncio.run(completions(installation, day))
        assert made == dict.fromkeys(ASSETS, 1), f"killed at {step!r}"
    assert find_differences(installation.engine, installation.settings) == []
    assert unfinished_runs(installation) == []


async def announce(installation: Installation, import_id: UUID) -> None:
    await publish_event(
        DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id), settings=BridgeSettings(nats_url=installation.nats_url)
    )


async def completions(installation: Installation, day: date) -> dict[str, int]:
    """流里成功的完成事件：资产 → 这一天的个数。"""
    client = await nats.connect(installation.nats_url)
    try:
        stream = client.jetstream()
        last = (await stream.stream_info(EVENTS_STREAM)).state.last_seq
        stored = [await stream.get_msg(EVENTS_STREAM, sequence) for sequence in range(1, last + 1)]
    finally:
        await client.close()
    events = [(message.subject, json.loads(message.data or b"{}")) for message in stored]
    return {
        asset: sum(found == subject and event["status"] == "success" and day.isoformat() in event["partitions"] for found, event in events)
        for asset, subject in ETL_COMPLETED.items()
    }


def unfinished_runs(installation: Installation) -> list[str]:
    query = sa.text("SELECT run_id FROM dagster.runs WHERE status NOT IN ('SUCCESS', 'FAILURE', 'CANCELED')")
    with installation.engine.connect() as connection:
        return list(connection.scalars(query))
