"""etl doctor：好的说好；台账与数据对不上（恢复了旧备份、事件没发）、队列没人管、服务器不在，都说出来并说怎么办。"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from nats.js.api import StreamConfig

from bridge.cancelling import cancel_all
from bridge.events import DataImportCompleted
from bridge.events.handlers import handlers_of
from bridge.events.listener import Listener
from bridge.events.publish import publish_event
from bridge.events.streams import DEAD_LETTERS
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.streams import task_streams
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.customers.asset import customers
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.leads.asset import leads
from etl_assets.orders.asset import orders
from etl_assets.testing.fixtures import MaterializeDays
from etl_assets.testing.raw_data import RawData
from tests.the_three import graph

from .conftest import NatsServer

Doctor = Callable[..., dict[str, tuple[str, str]]]
DAY = date(2026, 1, 5)


@pytest.fixture
def doctor(etl_settings: EtlSettings, tmp_path: Path) -> Doctor:
    """`doctor(nats_url, exit_code=…)`：检查 → （状态，说的话）。"""

    def examine(
        nats_url: str, *options: str, exit_code: int, database_url: str = etl_settings.database_url
    ) -> dict[str, tuple[str, str]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
        addresses = {"ETL_DATABASE_URL": database_url, "ETL_NATS_URL": nats_url, "ETL_STATE_DIR": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-m", "bridge.cli.main", "doctor", "--json", *options],
            env={**environment, **addresses, "ETL_CONNECT_TIMEOUT_SECONDS": "2"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == exit_code, result.stdout + result.stderr
        findings: list[dict[str, Any]] = json.loads(result.stdout)
        return {finding["check"]: (finding["state"], finding["says"]) for finding in findings}

    return examine


@pytest.fixture
def imported(
    raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, materialize_days: MaterializeDays
) -> object:
    """一次导入，一小时前完成，做到了底。"""
    import_id = raw_data.add_import([{}])
    with engine.begin() as connection:
        connection.execute(
            sa.update(import_tasks).values(completed_at=import_tasks.c.completed_at - sa.text("interval '1 hour'"))
        )
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=1)])
    assert materialize_days([orders, customers, leads], DAY).success
    return import_id


@pytest.mark.usefixtures("imported")
def test_what_is_right_is_ok_and_that_nobody_is_there_is_an_error(doctor: Doctor, nats_server: NatsServer) -> None:
    found = doctor(nats_server.url, exit_code=1)
    assert {
        found[check][0] for check in ("disk", "postgres", "nats", "schema", "indexes", "ledger", "table checks")
    } == {"ok"}
    assert found["stream EVENTS"] == (
        "error",
        "it does not exist: start `etl up` or `etl listen` and `etl worker` once",
    )
    assert found["listeners"] == (
        "error",
        "no listener is running, 0 messages wait for it: start `etl listen` (`etl up` starts it, too)",
    )
    assert found["workers"] == (
        "error",
        "no worker is running, 0 messages wait for it: start `etl worker` (`etl up` starts it, too)",
    )


async def test_a_listener_and_a_worker_that_are_there_are_seen(doctor: Doctor, nats_server: NatsServer) -> None:
    """工人只取两条车道。"""
    settings, stop = BridgeSettings(nats_url=nats_server.url), asyncio.Event()

    async def ring(_task: str, _lane: str) -> None:
        """没有要敲的。"""

    worker = SafeJetStreamBroker(settings.model_copy(update={"worker_lanes": ("interactive", "event")}))
    worker.is_worker_process = True
    await worker.startup()
    listening = asyncio.create_task(Listener(settings, handlers=handlers_of(graph), ring=ring).run(stop))

    async def take() -> None:
        async for _ in worker.listen():
            pass

    taking = asyncio.create_task(take())
    found = await asyncio.to_thread(doctor, nats_server.url, exit_code=0)
    assert (found["listeners"], found["workers"]) == (("ok", "running"), ("ok", "running"))
    assert found["TASKS.bulk"] == (
        "warning",
        "nobody has ever taken from it: start one that does (`etl worker --lanes`)",
    )
    assert "TASKS.event" not in found
    stop.set()
    await listening
    await cancel_all(taking)
    await worker.shutdown()


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("damage", "check", "remedy"),
    [
        ("DELETE FROM etl.ledger", "ledger", "`etl backfill --from 2026-01-05 --to 2026-01-05`"),
        ("DELETE FROM etl.import_events", "announced imports", "`etl replay`"),
        ("DELETE FROM orders", "tables", "`etl backfill --from 2026-01-05 --to 2026-01-05`"),
        ("UPDATE customers SET total_amount = total_amount + 1", "table checks", "`etl backfill`"),
        ("ALTER TABLE orders ALTER COLUMN quantity TYPE bigint", "schema", "quantity"),
        ("UPDATE etl.schema_version SET version_num = '0003'", "schema", "migrations are missing (0004, "),
    ],
)
def test_what_disagrees_is_said_with_what_to_do(
    doctor: Doctor, nats_server: NatsServer, engine: sa.Engine, damage: str, check: str, remedy: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(damage)
    state, says = doctor(nats_server.url, exit_code=1)[check]
    assert state == "error"
    assert remedy in says


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("damage", "check", "said"),
    [
        (
            (
                "INSERT INTO etl.waiting_events (target, import_id, event_id, stream_sequence, stored_at)"
                " SELECT 'public', gen_random_uuid(), gen_random_uuid(), n, now() - interval '2 minutes' FROM generate_series(1, 1200) n"
            ),
            "waiting events",
            "1,200 events wait for imports that are not completed in import_tasks, the oldest since ",
        ),
        (
            (
                "INSERT INTO etl.outbox (event_id, asset, payload, problem, retry_at)"
                " VALUES (gen_random_uuid(), 'orders', '{}', 'it is too large', now())"
            ),
            "completion events",
            "1 cannot be published and are tried again every ten minutes: it is too large",
        ),
        (
            "DROP INDEX ix_import_tasks_completed_at",
            "index ix_import_tasks_completed_at",
            "CREATE INDEX CONCURRENTLY ix_import_tasks_completed_at ON public.import_tasks (completed_at)",
        ),
    ],
)
def test_what_waits_is_a_warning_and_no_error(
    doctor: Doctor, nats_server: NatsServer, engine: sa.Engine, damage: str, check: str, said: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(damage)
    found = doctor(nats_server.url, exit_code=1)
    assert found[check][0] == "warning"
    assert said in found[check][1]
    assert found["ledger"] == ("ok", "every raw row is accounted for")


async def test_import_whose_event_waits_or_that_is_just_completed_is_no_error(
    doctor: Doctor, nats_server: NatsServer, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    import_id = uuid4()
    waiting = ImportEvent(import_id, uuid4(), sequence=1, stored_at=datetime.now(UTC))
    assert request_imports(engine, etl_settings, [waiting]) == ["missing"]
    raw_data.add_import([], import_id=import_id, completed_at=datetime.now(UTC) - timedelta(hours=1))
    raw_data.add_import([], completed_at=datetime.now(UTC) - timedelta(seconds=90))
    found = await asyncio.to_thread(doctor, nats_server.url, exit_code=1)
    assert "announced imports" not in found
    assert "waiting events" not in found
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM etl.waiting_events")
    state, says = (await asyncio.to_thread(doctor, nats_server.url, exit_code=1))["announced imports"]
    assert (state, str(import_id) in says) == ("error", True)


async def test_event_that_was_handled_but_is_not_in_the_ledger_is_noticed(
    doctor: Doctor,
    nats_server: NatsServer,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.setattr("bridge.events.handlers.get_engine", lambda: engine)
    monkeypatch.setattr("bridge.events.handlers.get_settings", lambda: etl_settings)
    settings = BridgeSettings(nats_url=nats_server.url)
    stop = asyncio.Event()

    async def ring(_task: str, _lane: str) -> None:
        """没有工人。"""

    listening = asyncio.create_task(Listener(settings, handlers=handlers_of(graph), ring=ring).run(stop))
    import_id = raw_data.add_import([{}])
    async with asyncio.timeout(30):
        await publish_event(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id), settings=settings)
        while not await asyncio.to_thread(knows, engine):
            await asyncio.sleep(0.05)
    assert "newest event" not in await asyncio.to_thread(doctor, nats_server.url, exit_code=1)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM etl.import_events")
    state, says = (await asyncio.to_thread(doctor, nats_server.url, exit_code=1))["newest event"]
    assert (state, "`etl replay --seq 1`" in says) == ("error", True)
    withdrawn = raw_data.add_import([{}], status="failed")  # 从未入表就撤回的，台账本来不记
    async with asyncio.timeout(30):
        await publish_event(
            DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=withdrawn, status="failed"), settings=settings
        )
        while "newest event" in await asyncio.to_thread(doctor, nats_server.url, exit_code=1):
            await asyncio.sleep(0.05)
    stop.set()
    await listening


def knows(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql("SELECT count(*) FROM etl.import_events").scalar())


def test_servers_that_are_away_are_said_and_the_rest_is_still_looked_at(
    doctor: Doctor, nats_server: NatsServer
) -> None:
    found = doctor(nats_server.url, exit_code=1, database_url="postgresql://etl@127.0.0.1:1/etl")
    assert found["postgres"][0] == "error"
    assert "check that it is up" in found["postgres"][1]
    assert found["nats"][0] == "ok"
    nats_server.kill()
    found = doctor(nats_server.url, exit_code=1)
    assert (found["nats"][0], found["postgres"][0]) == ("error", "ok")


def test_missing_tables_do_not_keep_it_from_the_queues(
    doctor: Doctor, nats_server: NatsServer, engine: sa.Engine
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA etl CASCADE")
    found = doctor(nats_server.url, exit_code=1)
    assert found["schema"][0] == "error"
    assert "run `etl init-db`" in found["schema"][1]
    assert any(check.startswith("stream") for check in found)


@pytest.fixture
async def connection(nats_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    link = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test")
    await link.open()
    for config in (DEAD_LETTERS, *task_streams(BridgeSettings())):
        await ensure_stream(link, config)
    yield link
    await link.close()


async def test_streams_that_differ_from_ours_are_said_with_both_values(
    doctor: Doctor, nats_server: NatsServer, connection: JetStreamConnection
) -> None:
    found = await asyncio.to_thread(doctor, nats_server.url, exit_code=1)
    assert not [check for check in found if check.startswith("limits of")]
    await connection.context.update_stream(
        (await connection.context.stream_info("TASKS_DLQ")).config, max_bytes=1 << 20
    )
    await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"], max_msg_size=10_000))
    found = await asyncio.to_thread(doctor, nats_server.url, exit_code=1)
    assert found["limits of TASKS_DLQ"][0] == "warning"
    assert found["limits of TASKS_DLQ"][1].startswith(
        "max_bytes is 1048576, we create it with 67108864: sizes and replicas stay"
    )
    assert found["limits of EVENTS"][1].startswith("max_msg_size is 10000, ETL_EVENT_MAX_BYTES allows 262144")


async def test_dead_letters_that_fill_up_are_said_before_they_are_full(
    doctor: Doctor, nats_server: NatsServer, connection: JetStreamConnection, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    await connection.context.update_stream((await connection.context.stream_info("EVENTS_DLQ")).config, max_msgs=10)
    for number in range(8):
        await connection.publish("events_dlq.x", b"{}", message_id=str(number))
    state, says = (await asyncio.to_thread(doctor, nats_server.url, exit_code=1))["dead letters"]
    assert (state, says.startswith("8 in EVENTS_DLQ, 80% full, then what belongs there waits")) == ("warning", True)
    environment = {
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_NATS_URL": nats_server.url,
        "ETL_STATE_DIR": str(tmp_path),
    }
    for command in (["status"], ["dlq", "list"]):
        assert "EVENTS_DLQ is 80 % full" in await asyncio.to_thread(said_by, command, environment)
    for number in (8, 9):
        await connection.publish("events_dlq.x", b"{}", message_id=str(number))
    state, says = (await asyncio.to_thread(doctor, nats_server.url, exit_code=1))["dead letters"]
    assert (state, "10 in EVENTS_DLQ, 100% full: what belongs there waits" in says) == ("error", True)


def said_by(command: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "bridge.cli.main", *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout + result.stderr
