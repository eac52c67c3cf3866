"""热的一路的测试共用的：一个工人，排队的运行，死了的工人。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import date
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRunStatus

from bridge.queue.broker import SafeJetStreamBroker
from bridge.runs import tasks
from bridge.runs.lanes import LANE_TAG
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.runs import enqueue
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, request_imports


@contextmanager
def warm_worker(
    location: CodeLocation, engine: sa.Engine, settings: EtlSettings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunWorker]:
    """一个工人，它的 Dagster 实例在 folder 里（SQLite）。"""
    monkeypatch.setattr("etl_assets.orchestration.resources.get_engine", lambda: engine)
    monkeypatch.setattr("etl_assets.orchestration.resources.get_settings", lambda: settings)
    with DagsterInstance.local_temp(str(folder)) as instance:
        worker = RunWorker(instance=instance, location=location, engine=engine, settings=settings, lease_seconds=30)
        yield worker
        worker.heartbeats.dispose()


@asynccontextmanager
async def connected_tasks(
    worker: RunWorker, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SafeJetStreamBroker]:
    """`bridge.runs.tasks` 的任务在测试里直接调用，它们的 broker 连着 NATS，工人是这一个。"""
    broker = SafeJetStreamBroker(settings)
    broker.state.run_worker, broker.state.unpublished, broker.state.ringing_later = worker, asyncio.Event(), None
    monkeypatch.setattr(tasks, "broker", broker)
    await broker.startup()
    try:
        yield broker
    finally:
        await broker.shutdown()


def announce(engine: sa.Engine, settings: EtlSettings, import_id: object) -> None:
    event = ImportEvent(import_id, uuid4(), sequence=7)  # type: ignore[arg-type]  # 夹具给的 UUID
    assert request_imports(engine, settings, [event]) == ["requested"]


def submit(worker: RunWorker, *assets: str, day: str = "2026-01-05", last_day: str | None = None) -> str:
    """像协调者那样：建好、标成 QUEUED。"""
    run = worker.location.create_run(
        worker.instance,
        job_name="etl",
        run_id=str(uuid4()),
        assets=assets,
        days=DayRange(date.fromisoformat(day), date.fromisoformat(last_day or day)),
        tags={LANE_TAG: "interactive"},
    )
    enqueue(worker.instance, run)
    return run.run_id


def begin(worker: RunWorker, run_id: str) -> None:
    """像执行它那样，标成 STARTED。"""
    worker.instance.report_dagster_event(DagsterEvent(DagsterEventType.RUN_START.value, "etl"), run_id=run_id)


def take_and_begin(worker: RunWorker, *run_ids: str) -> None:
    """接手，开始做；此后就死了。"""
    for run_id in run_ids:
        assert worker.take(run_id) is not None
        begin(worker, run_id)


def expire_leases(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE etl.leases SET expires_at = clock_timestamp()")


def status(worker: RunWorker, run_id: str) -> DagsterRunStatus:
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def wait_until_blocked(engine: sa.Engine) -> None:
    deadline = time.monotonic() + 20
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        waiting = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        while not connection.scalar(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.02)
