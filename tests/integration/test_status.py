"""etl status：第一行说一切都好，或者什么最急、另有几件；下面是数字。监听器与工人是真的。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from bridge.cancelling import cancel_all
from bridge.cli.status import status_command
from bridge.operations.queues import read_queue_depths
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings
from etl_assets.definitions import defs
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.reports.reports import event_lag
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .listening import Bridge, open_bridge
from .warm_runs import announce

Status = Callable[..., Any]
KEYS = {
    *(
        "headline",
        "alerts",
        "database",
        "nats",
        "ledger",
        "held",
        "running",
        "failed",
        "unbalanced",
        "queues",
        "rejected",
        "troubles",
    ),
    *("lag", "unpublished_events", "set_aside_events", "waiting_events", "scattered_orders", "indexes"),
    *("failed_checks", "unsaid_alerts", "disk"),
}


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(nats_url=nats_server.url, connect_timeout_seconds=2)


@pytest.fixture
def status(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    settings: BridgeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Status:
    """印出来的各行；as_json 是 --json 的对象。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings, bridge_settings=settings)

    def run(*, as_json: bool = False) -> Any:
        result = CliRunner().invoke(status_command, ["--json"] if as_json else [])
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if as_json else result.output.splitlines()

    return run


@pytest.fixture
async def bridge(
    settings: BridgeSettings, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as made:
        yield made


@asynccontextmanager
async def a_worker(settings: BridgeSettings) -> AsyncIterator[None]:
    """等着任务，一个也不做。"""
    worker = SafeJetStreamBroker(settings)
    worker.is_worker_process = True
    await worker.startup()

    async def take() -> None:
        async for _ in worker.listen():
            pass

    taking = asyncio.create_task(take())
    try:
        yield
    finally:
        await cancel_all(taking)
        await worker.shutdown()


async def until_taken(settings: BridgeSettings, *, queues: int) -> None:
    async with asyncio.timeout(30):
        while sum(bool(row["takers"]) for row in await read_queue_depths(settings)) < queues:
            await asyncio.sleep(0.1)


async def test_first_line_says_all_well_or_what_is_most_urgent(
    status: Status, bridge: Bridge, settings: BridgeSettings
) -> None:
    async with bridge.listening(), a_worker(settings):
        await until_taken(settings, queues=4)
        lines = await asyncio.to_thread(status)
        assert lines[0] == "all well"
        assert "listeners: 1 wait for events" in lines
        assert "workers: 0 busy, 1 idle" in lines
        report = await asyncio.to_thread(status, as_json=True)
        assert (report["headline"], report["alerts"], report.keys()) == ("all well", [], KEYS)
    lines = await asyncio.to_thread(status)
    assert lines[0] == "no listener is running, 0 events wait for it: `etl listen` (and 1 more)"
    assert lines[1].startswith("also: no worker is running")
    report = await asyncio.to_thread(status, as_json=True)
    assert [alert["key"] for alert in report["alerts"]] == ["listener", "workers"]


async def test_lane_that_no_worker_serves_is_said_only_while_others_are_idle(
    status: Status, bridge: Bridge, settings: BridgeSettings
) -> None:
    async with bridge.listening():
        narrow = settings.model_copy(update={"worker_lanes": ("interactive", "event")})
        async with a_worker(settings):
            await until_taken(settings, queues=4)
        ringing = SafeJetStreamBroker(settings)
        await ringing.startup()
        await ringing.ring(MATERIALIZE_DUE, "bulk")
        await ringing.shutdown()
        async with a_worker(narrow):
            await until_taken(settings, queues=3)
            report = await asyncio.to_thread(status, as_json=True)
    assert [alert["key"] for alert in report["alerts"]] == ["lane bulk"]
    assert report["headline"].endswith("`etl worker --lanes bulk`")


def test_failed_runs_held_days_lag_and_newest_day_are_shown(
    status: Status,
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
) -> None:
    stored_at = datetime.now(UTC) - timedelta(seconds=30)
    day = datetime(2026, 1, 5, 4, tzinfo=UTC)
    for number in (0, 1):
        import_id = raw_data.add_import([{"order_id": f"A{number}", "ordered_at": day + timedelta(days=number)}])
        assert request_imports(
            engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=1, stored_at=stored_at)]
        ) == ["requested"]
        if number:
            with engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE orders ADD CONSTRAINT none CHECK (order_date < '2026-01-06')")
        claim = worker.claim()
        assert claim is not None
        worker.execute(worker.start(claim))
    report = status(as_json=True)
    ledger = {row["asset"]: row for row in report["ledger"]}
    assert [ledger[asset]["newest_materialized_day"] for asset in ("orders", "leads")] == ["2026-01-05"] * 2
    (failed,) = report["failed"]
    assert (failed["asset"], failed["first_day"], failed["still_due"]) == ("orders", "2026-01-06", True)
    assert "none" in failed["reason"]
    (held,) = report["held"]
    assert held["remedy"] == "etl backfill --asset orders --from 2026-01-06 --to 2026-01-06"
    assert report["lag"]["days"] == 1
    assert 30 <= report["lag"]["p50_seconds"] == report["lag"]["p99_seconds"] < 600
    lines = status()
    assert any(line.startswith("from event to data, last hour: p50 ") for line in lines)
    assert any("1 days of orders are held, the first 2026-01-06" in line for line in lines[:3])


def test_lag_leaves_out_days_that_nobody_waited_for(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """没有事件时刻的（旧版本收下的），与一小时以前做的。"""
    import_id = raw_data.add_import([{}])
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=1, stored_at=datetime.now(UTC))])
    claim = worker.claim()
    assert claim is not None
    worker.execute(worker.start(claim))

    def days(change: str) -> int:
        with engine.begin() as connection, connection.begin_nested() as savepoint:
            connection.exec_driver_sql(change)
            found: int = event_lag(connection, etl_settings)["days"]
            savepoint.rollback()
        return found

    assert days("SELECT 1") == 1
    assert days("UPDATE etl.import_events SET stored_at = NULL") == 0
    assert days("UPDATE etl.ledger SET materialized_at = materialized_at - interval '61 minutes'") == 0
    assert days("UPDATE etl.ledger SET requested = requested + 1, materialized = materialized + 1") == 0
    with engine.connect() as connection:
        assert connection.scalar(sa.select(import_events.c.stored_at)) is not None


@pytest.mark.parametrize(
    ("damage", "settings_of", "key"),
    [
        ("UPDATE etl.ledger SET requested = 9, requested_at = now() - interval '16 minutes'", {}, "lag"),
        ("UPDATE etl.ledger SET requested = 9, requested_at = now() - interval '14 minutes'", {}, None),
        (
            "UPDATE etl.ledger SET materialized_at = now() - interval '27 hours'",
            {"alert_fresh_hours": 26},
            "freshness of orders",
        ),
        ("UPDATE etl.ledger SET materialized_at = now() - interval '27 hours'", {}, None),
        (
            (
                "INSERT INTO etl.failed_runs (target, run_id, asset, first_day, last_day, reason)"
                " SELECT target, 'r', asset, day, day, 'AccountingError: the rows do not add up' FROM etl.ledger;"
                " UPDATE etl.ledger SET requested = 9"
            ),
            {},
            "accounting",
        ),
        (
            (
                "INSERT INTO etl.outbox (event_id, asset, payload, problem, retry_at)"
                " VALUES (gen_random_uuid(), 'orders', '{}', 'it is too large', now())"
            ),
            {},
            "set aside",
        ),
    ],
)
def test_what_deserves_to_wake_somebody(
    status: Status,
    engine: sa.Engine,
    settings: BridgeSettings,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    settings_of: dict[str, int],
    key: str | None,
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO etl.ledger (target, asset, day, requested, materialized, requested_at, materialized_at)"
            " VALUES ('public', 'orders', '2026-01-05', 1, 1, now(), now())"
        )
        connection.exec_driver_sql(damage)
    use_in_commands(monkeypatch, bridge_settings=settings.model_copy(update=settings_of))
    found = {alert["key"] for alert in status(as_json=True)["alerts"]} - {"listener", "workers"}
    assert found == ({key} if key else set())


def test_check_that_fails_at_night_is_said_until_it_passes(
    status: Status, worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    assert worker.execute(worker.start(claim)).succeeded

    def checked_after(change: str) -> list[str]:
        with engine.begin() as connection:
            connection.exec_driver_sql(change)
        defs.resolve_job_def("table_checks").execute_in_process(instance=worker.instance)
        return [alert["en"] for alert in status(as_json=True)["alerts"] if alert["key"].startswith("check ")]

    assert checked_after("SELECT 1") == []
    assert checked_after("UPDATE orders SET quantity = -1") == [
        "the check non_negative of orders finds 1 wrong: make the days again; if it stays, something else writes these tables"
    ]
    assert checked_after("UPDATE orders SET quantity = 1") == []
