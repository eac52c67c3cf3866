"""热的一路：领取、建运行、在线程里执行；Dagster 里看得见，完成事件在发件箱里。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus

from bridge.code_location import CODE_MODULE, LOCATION_NAME
from bridge.dagster_adapter import CodeLocation
from bridge.run_worker import RunWorker
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import ledger, outbox
from etl_assets.services.intake import ImportEvent, request_imports
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData


@pytest.fixture(scope="module")
def location() -> CodeLocation:
    return CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)


@pytest.fixture
def worker(
    location: CodeLocation,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RunWorker]:
    monkeypatch.setattr("etl_assets.resources.get_engine", lambda: engine)
    monkeypatch.setattr("etl_assets.resources.get_settings", lambda: etl_settings)
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield RunWorker(instance=instance, location=location, engine=engine, settings=etl_settings, lease_seconds=30)


def announce(engine: sa.Engine, settings: EtlSettings, import_id: object) -> None:
    assert request_imports(engine, settings, [ImportEvent(import_id, uuid4())]) == ["requested"]  # type: ignore[arg-type]  # 夹具给的 UUID


def test_claimed_days_become_one_successful_run_with_events(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, read_table: ReadTable
) -> None:
    days = [datetime(2026, 1, day, 4, tzinfo=UTC) for day in (5, 6, 7)]
    import_id = raw_data.add_import([{"order_id": f"A-{at.day}", "ordered_at": at} for at in days])
    announce(engine, etl_settings, import_id)
    claim = worker.claim()
    assert claim is not None
    assert (claim.days.first, claim.days.last, claim.more) == (date(2026, 1, 5), date(2026, 1, 7), False)
    assert worker.execute(claim).succeeded
    run = worker.instance.get_run_by_id(claim.lease.run_id)
    assert run is not None
    assert run.status is DagsterRunStatus.SUCCESS
    assert run.remote_job_origin is not None
    assert run.remote_job_origin.location_name == LOCATION_NAME
    assert read_table("orders").height == 3
    assert worker.claim() is None
    with engine.connect() as connection:
        events = connection.execute(sa.select(outbox.c.asset, outbox.c.payload).order_by(outbox.c.outbox_id)).all()
    assert [event.asset for event in events] == ["orders", "customers", "leads"]
    assert [event.payload["downstream"] for event in events] == ["included", "included", "pending"]
    assert all(event.payload["import_ids"] == [str(import_id)] for event in events)
    assert all(event.payload["partitions"] == ["2026-01-05", "2026-01-06", "2026-01-07"] for event in events)


def test_failed_run_is_tried_again_later_and_announced(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE orders RENAME TO orders_away")
    claim = worker.claim()
    assert claim is not None
    result = worker.execute(claim)
    assert (result.succeeded, result.failed_step, result.error_class) == (False, "orders", "TableContractError")
    with engine.connect() as connection:
        event = connection.execute(sa.select(outbox.c.asset, outbox.c.payload)).one()
        held = connection.scalars(sa.select(ledger.c.held_reason).where(ledger.c.asset == "orders")).one()
    assert (event.asset, event.payload["status"]) == ("orders", "failed")
    assert "orders" in event.payload["error"]
    assert held == result.error
    assert worker.claim() is None


def test_days_of_a_dead_worker_are_claimed_again_and_its_run_is_failed(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    first = worker.claim()
    assert first is not None
    worker.location.create_run(worker.instance, job_name="etl", run_id=first.lease.run_id, assets=first.assets, days=first.days, tags={})
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE etl.leases SET expires_at = clock_timestamp()")
    second = worker.claim()
    assert second is not None
    assert second.days == first.days
    abandoned = worker.instance.get_run_by_id(first.lease.run_id)
    assert abandoned is not None
    assert abandoned.status is DagsterRunStatus.FAILURE
    assert worker.execute(second).succeeded
