"""热的一路：领取、建运行、在线程里执行；Dagster 里看得见，完成事件在发件箱里。"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import AssetExecutionContext, DagsterEvent, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from taskiq import Context, TaskiqMessage

from bridge.nats_names import TASKS_STREAM
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs import run_reconciler, tasks
from bridge.runs import worker as run_worker
from bridge.runs import worker as worker_module
from bridge.runs.lanes import LANE_TAG
from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.code_location_name import LOCATION_NAME
from bridge.warm_dagster.runs import enqueue
from bridge.warm_dagster.storage_faults import noted
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, EtlError
from etl_assets.core.etl_tables import leases as leases_table
from etl_assets.core.etl_tables import ledger, outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.customers import etl as customers_etl
from etl_assets.ledger import leases
from etl_assets.ledger.claims import RUSH_IMPORTS
from etl_assets.ledger.failures import MAX_FAILURES
from etl_assets.ledger.locks import lock_days
from etl_assets.ledger.requests import request_days
from etl_assets.orchestration.asset_runs import days_of
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData
from tests.other_sessions import end_other_sessions

from .conftest import NatsServer
from .warm_runs import (
    announce,
    begin,
    connected_tasks,
    expire_leases,
    status,
    submit,
    take_and_begin,
    wait_until_blocked,
)


def test_claimed_days_become_one_successful_run_with_events(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, read_table: ReadTable
) -> None:
    days = [datetime(2026, 1, day, 4, tzinfo=UTC) for day in (5, 6, 7)]
    import_id = raw_data.add_import([{"order_id": f"A-{at.day}", "ordered_at": at} for at in days])
    announce(engine, etl_settings, import_id)
    claim = worker.claim()
    assert claim is not None
    assert (claim.days.first, claim.days.last, claim.more) == (date(2026, 1, 5), date(2026, 1, 7), False)
    assert worker.execute(worker.start(claim)).succeeded
    run = worker.instance.get_run_by_id(claim.lease.run_id)
    assert run is not None
    assert run.status is DagsterRunStatus.SUCCESS
    assert run.remote_job_origin is not None
    assert run.remote_job_origin.location_name == LOCATION_NAME
    assert run.tags["dagster/dayline/import_id"] == str(import_id)
    assert run.tags["dagster/dayline/stream_sequence"] == "7"
    assert read_table("orders").height == 3
    assert worker.claim() is None
    with engine.connect() as connection:
        events = connection.execute(sa.select(outbox.c.asset, outbox.c.payload).order_by(outbox.c.outbox_id)).all()
    assert [event.asset for event in events] == ["orders", "customers", "leads"]
    assert [event.payload["downstream"] for event in events] == ["included", "included", "pending"]
    assert all(event.payload["import_ids"] == [str(import_id)] for event in events)
    assert all(event.payload["partitions"] == ["2026-01-05", "2026-01-06", "2026-01-07"] for event in events)


def test_failed_run_is_held_and_announced(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    execute(engine, "ALTER TABLE orders ADD CONSTRAINT no_such_order CHECK (quantity < 0)")
    claim = worker.claim()
    assert claim is not None
    result = worker.execute(worker.start(claim))
    assert [(failure.asset, failure.kind) for failure in result.failures] == [("orders", "permanent")]
    with engine.connect() as connection:
        event = connection.execute(sa.select(outbox.c.asset, outbox.c.payload)).one()
    assert (event.asset, event.payload["status"]) == ("orders", "failed")
    assert "no_such_order" in event.payload["error"]
    assert orders_entry(engine).held_reason == result.error
    assert worker.claim() is None


@pytest.mark.parametrize(("broken", "asked"), [("orders", None), ("orders", "orders"), ("customers", "customers")])
def test_day_that_was_asked_for_again_while_its_run_was_failing_is_not_held(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    asked: str | None,
) -> None:
    """人改好了毛病、要求重做，运行却早已读过坏的：它的失败记在这个要求后面，也挡不住它，后面的也不挡。"""
    announce(engine, etl_settings, raw_data.add_import([{}]))
    execute(engine, f"ALTER TABLE {broken} ADD CONSTRAINT none_at_all CHECK (created_at IS NULL)")
    record_failure = worker_module.record_failure

    def record_late(connection: sa.Connection, *args: Any, **options: Any) -> list[str]:
        execute(engine, f"ALTER TABLE {broken} DROP CONSTRAINT none_at_all")
        with engine.begin() as other:
            request_days(other, "public", [date(2026, 1, 5)], asset=asked)
        return record_failure(connection, *args, **options)

    monkeypatch.setattr(worker_module, "record_failure", record_late)
    claim = worker.claim()
    assert claim is not None
    assert not worker.execute(worker.start(claim)).succeeded
    with engine.begin() as connection:
        rows = connection.execute(sa.select(ledger).where(ledger.c.requested > ledger.c.materialized)).all()
        assert {row.asset: (row.held_reason, row.failures) for row in rows}[broken] == (None, 1)
        assert {row.held_reason for row in rows} == {None}
        connection.execute(sa.update(ledger).values(retry_at=None))
    again = worker.claim()
    assert again is not None
    assert worker.execute(worker.start(again)).succeeded


# ---- 数据库不让做，不是哪一天的错 ------------------------------------------------------

REFUSALS = {
    "table away": ("ALTER TABLE orders RENAME TO orders_away", "ALTER TABLE orders_away RENAME TO orders"),
    "column away": ("ALTER TABLE orders DROP raw_id", "ALTER TABLE orders ADD raw_id bigint"),
    "source away": ("ALTER TABLE raw_orders RENAME TO raw_away", "ALTER TABLE raw_away RENAME TO raw_orders"),
}


@pytest.mark.parametrize("refusal", list(REFUSALS))
def test_day_of_a_table_that_is_away_is_due_again_and_done_when_it_is_back(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    read_table: ReadTable,
    refusal: str,
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    damage, mend = REFUSALS[refusal]
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    execute(engine, damage)
    assert [failure.kind for failure in worker.execute(held).failures] == ["refused"]
    entry = orders_entry(engine)
    assert (entry.held_reason, entry.failures) == (None, 0)
    assert entry.retry_at is not None
    with pytest.raises(DatabaseRefusedError, match="is missing"):  # 不领：一天一个失败的运行帮不了谁
        worker.claim()
    execute(engine, mend, "UPDATE etl.ledger SET retry_at = clock_timestamp()")
    again = worker.claim()
    assert again is not None
    assert worker.execute(worker.start(again)).succeeded
    assert read_table("orders").height == 1


def test_run_that_meets_a_read_only_window_counts_no_failure_though_its_lease_expires(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    with ThreadPoolExecutor(1) as pool:
        with contextlib.suppress(sa.exc.OperationalError), engine.connect() as other, other.begin():
            lock_days(other, "public", claim.days)
            executing = pool.submit(worker.execute, held)
            wait_until_blocked(engine)
            expire_leases(engine)
            set_read_only(engine, "on")  # 断开了每个会话，锁也放了
        time.sleep(1.5)
        assert not executing.done()
        set_read_only(engine, "off")
        assert not executing.result(20).succeeded
    entry = orders_entry(engine)
    assert (entry.held_reason, entry.failures) == (None, 0)
    assert entry.retry_at is not None


def test_run_that_cannot_be_recorded_while_others_hold_a_lock_is_recorded_when_they_let_go(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """锁等不到，不是工人死了：多少次都再试，那一天按它自己的错来算。"""
    monkeypatch.setattr(run_worker, "_ATTEMPTS", 1)
    announce(engine, etl_settings, raw_data.add_import([{}]))
    execute(engine, "ALTER TABLE orders ADD CONSTRAINT no_such_order CHECK (quantity < 0)")
    impatient = replace(worker, engine=build_engine(etl_settings.model_copy(update={"lock_timeout_seconds": 1})))
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    with ThreadPoolExecutor(1) as pool, engine.connect() as other:
        with other.begin():
            other.exec_driver_sql("LOCK TABLE etl.outbox IN EXCLUSIVE MODE")
            executing = pool.submit(impatient.execute, held)
            wait_until_blocked(engine)
            time.sleep(1.5)
            assert not executing.done()
        result = executing.result(20)
    impatient.engine.dispose()
    impatient.heartbeats.dispose()
    assert orders_entry(engine).held_reason == result.error
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(leases_table)) == 0


async def test_run_that_cannot_be_settled_still_has_its_events_published_and_its_door_rung(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise DatabaseUnavailableError("away again and again")

    announce(engine, etl_settings, raw_data.add_import([{}]))
    run_id = submit(worker, "orders", day="2026-01-06")
    monkeypatch.setattr(RunWorker, "execute", fail)
    async with connected_tasks(worker, BridgeSettings(nats_url=nats_server.url), monkeypatch) as broker:
        for number, work in enumerate((tasks.materialize_due(), tasks.execute_run(run_id)), start=1):
            with pytest.raises(DatabaseUnavailableError):
                await work
            assert broker.state.unpublished.is_set()
            assert (await broker.js.stream_info(TASKS_STREAM)).state.messages == number
            broker.state.unpublished.clear()


async def test_reconciler_leaves_living_workers_time_to_settle_after_a_read_only_window(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    assert worker.claim() is not None
    expire_leases(engine)
    looks: list[str] = []

    def noting(name: str, look: Callable[..., Any]) -> Callable[..., Any]:
        def noted(worker: RunWorker, **named: float) -> Any:
            try:
                result = look(worker, **named)
            except EtlError:
                looks.append(f"{name} failed")
                raise
            looks.append(name)
            return result

        return noted

    broker = SafeJetStreamBroker(BridgeSettings(nats_url=nats_server.url))
    monkeypatch.setattr(tasks, "broker", broker)
    monkeypatch.setattr(tasks, "INTERVAL_SECONDS", 0.2)
    monkeypatch.setattr(tasks, "reconcile_runs", noting("look", reconcile_runs))
    monkeypatch.setattr(RunWorker, "check_database", noting("check", RunWorker.check_database))
    await broker.startup()
    set_read_only(engine, "on")
    reconciling = asyncio.create_task(tasks._reconcile(worker))
    try:
        async with asyncio.timeout(20):
            while not looks:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(set_read_only, engine, "off")
            while looks[-1] != "look":
                await asyncio.sleep(0.05)
    finally:
        reconciling.cancel()
        await broker.shutdown()
    assert list(dict.fromkeys(looks)) in (
        ["look failed", "check", "look"],
        ["look failed", "check failed", "check", "look"],
    )


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        ("SET transaction_read_only = on; CREATE TABLE t (i int)", "refused"),
        ("SELECT 1 FROM no_such_table", "refused"),
        ("SET ROLE pg_read_all_settings; CREATE TABLE public.t (i int)", "refused"),
        ("SET statement_timeout = 1; SELECT pg_sleep(1)", "unknown"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "transient"),
        ("SELECT 'x'::int", "unknown"),
    ],
)
def test_error_of_dagsters_storage_in_a_run_is_judged_by_what_it_was(
    worker: RunWorker, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, make: str, kind: str
) -> None:
    """真的 psycopg2，真的 PostgreSQL：种类随失败走，不由类名猜。"""
    storage = sa.create_engine(engine.url.set(drivername="postgresql+psycopg2"), poolclass=sa.pool.NullPool)

    def fail(*_: object) -> None:
        with storage.connect() as connection:
            connection.exec_driver_sql(make)

    held = worker.take(submit(worker, "orders"))
    assert held is not None
    monkeypatch.setattr("etl_assets.orchestration.asset_runs.days_of", fail)
    result = worker.execute(held)
    assert not result.succeeded
    assert [failure.kind for failure in result.failures] == [kind], result


@pytest.mark.parametrize(("survived_in", "kind"), [("orders", "unknown"), ("customers", "transient")])
def test_error_of_dagsters_storage_is_that_of_its_own_step_only(
    worker: RunWorker,
    engine: sa.Engine,
    raw_data: RawData,
    monkeypatch: pytest.MonkeyPatch,
    survived_in: str,
    kind: str,
) -> None:
    """挺过去了的，与后面一步的代码错无关：代码错不能永远重试下去。"""
    raw_data.add_import([{}])
    storage = sa.create_engine(engine.url.set(drivername="postgresql+psycopg2"), poolclass=sa.pool.NullPool)

    def days(context: AssetExecutionContext, settings: EtlSettings) -> DayRange:
        asset = context.asset_key.to_user_string()
        if asset == survived_in:
            with contextlib.suppress(sa.exc.DBAPIError), noted(storage.connect()) as connection:
                connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        if asset == "customers":
            raise KeyError("a mistake")
        return days_of(context, settings)

    held = worker.take(submit(worker, "orders", "customers"))
    assert held is not None
    monkeypatch.setattr("etl_assets.orchestration.asset_runs.days_of", days)
    assert [(failure.asset, failure.kind) for failure in worker.execute(held).failures] == [("customers", kind)]


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def set_read_only(engine: sa.Engine, value: str) -> None:
    """新的会话才认这个设置，所以断开别的会话。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        connection.exec_driver_sql(
            f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = {value}'
        )
        end_other_sessions(connection)
        connection.invalidate()


def orders_entry(engine: sa.Engine) -> sa.Row[Any]:
    with engine.connect() as connection:
        return connection.execute(sa.select(ledger).where(ledger.c.asset == "orders")).one()


def test_days_of_a_dead_worker_are_claimed_again_by_a_run_that_continues_its_run(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    first = worker.claim()
    assert first is not None
    dead = worker.start(first)
    begin(worker, dead.run.run_id)
    expire_leases(engine)
    assert worker.claim() is None
    assert [ring.task_name for ring in reconcile_runs(worker)] == [MATERIALIZE_DUE]
    assert status(worker, dead.run.run_id) is DagsterRunStatus.FAILURE
    second = worker.claim()
    assert second is not None
    assert (second.days, second.retry_of) == (first.days, dead.run.run_id)
    retry = worker.start(second)
    assert (retry.run.parent_run_id, retry.run.root_run_id) == (dead.run.run_id, dead.run.run_id)
    assert worker.execute(retry).succeeded
    with engine.connect() as connection:
        event = connection.execute(sa.select(outbox.c.asset, outbox.c.payload).order_by(outbox.c.outbox_id)).first()
    assert event is not None
    assert (event.asset, event.payload["status"], event.payload["run_id"]) == ("orders", "failed", dead.run.run_id)


def test_run_that_kills_its_workers_is_held_in_the_end(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    deaths = 0
    while (claim := worker.claim()) is not None:
        worker.start(claim)
        expire_leases(engine)
        reconcile_runs(worker)
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE etl.ledger SET retry_at = clock_timestamp() WHERE retry_at IS NOT NULL")
        deaths += 1
    assert deaths == MAX_FAILURES


# ---- 网页来的运行 -------------------------------------------------------------------


def test_queued_run_is_executed_once_however_often_its_message_comes(
    worker: RunWorker, raw_data: RawData, read_table: ReadTable
) -> None:
    raw_data.add_import([{}])
    run_id = submit(worker, "orders", "customers", "leads")
    held = worker.take(run_id)
    assert held is not None
    assert worker.take(run_id) is None
    assert worker.execute(held).succeeded
    assert worker.take(run_id) is None
    assert status(worker, run_id) is DagsterRunStatus.SUCCESS
    assert read_table("business_leads").height == 1


def test_run_of_a_dead_worker_is_made_again_with_its_unfinished_assets_only(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    run_id = submit(worker, "orders", "customers", "leads")
    held = worker.take(run_id)
    assert held is not None

    def die(*_arguments: object) -> None:
        raise SystemExit  # 到这里为止 orders 做完了；进程死了，什么收尾也没有

    with monkeypatch.context() as patch:
        patch.setattr(customers_etl, "write_customers", die)
        patch.setattr(RunWorker, "_finish", die)
        with pytest.raises(SystemExit):
            worker.execute(held)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM etl.ledger")
    begin(worker, run_id)
    expire_leases(engine)
    (ring,) = reconcile_runs(worker)
    assert (ring.task_name, ring.lane) == (EXECUTE_RUN, "interactive")
    assert status(worker, run_id) is DagsterRunStatus.FAILURE
    retry = worker.take(*ring.arguments)
    assert retry is not None
    assert (retry.assets, retry.run.parent_run_id) == (("customers", "leads"), run_id)
    assert worker.execute(retry).succeeded
    assert reconcile_runs(worker) == []


@pytest.mark.parametrize(
    "last_step",
    [(run_reconciler, "enqueue"), (DagsterInstance, "report_run_failed"), (run_reconciler, "_record")],
    ids=lambda step: step[1],
)
def test_worker_that_dies_while_it_buries_a_run_leaves_one_retry(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
    last_step: tuple[object, str],
) -> None:
    """收尾的也会死在任何两步之间：下一个收尾的接着做，不多一个运行，不少一个完成事件。"""

    def die(*_: object, **_named: object) -> None:
        raise SystemExit

    raw_data.add_import([{}])
    run_id = submit(worker, "orders", "customers", "leads")
    take_and_begin(worker, run_id)
    expire_leases(engine)
    with monkeypatch.context() as patch:
        patch.setattr(*last_step, die)
        with pytest.raises(SystemExit):
            reconcile_runs(worker)
    reconcile_runs(worker)
    (retry,) = worker.instance.get_runs(RunsFilter(tags={"dagster/parent_run_id": run_id}))
    assert [status(worker, made) for made in (run_id, retry.run_id)] == [
        DagsterRunStatus.FAILURE,
        DagsterRunStatus.QUEUED,
    ]
    held = worker.take(retry.run_id)
    assert held is not None
    assert worker.execute(held).succeeded
    with engine.connect() as connection:
        events = connection.execute(sa.select(outbox.c.payload).order_by(outbox.c.outbox_id)).scalars().all()
        assert connection.scalar(sa.select(sa.func.count()).select_from(leases_table)) == 0
    assert [(event["run_id"], event["status"]) for event in events] == [
        (run_id, "failed"),
        *[(retry.run_id, "success")] * 3,
    ]


def test_run_cancelled_while_queued_is_not_executed(worker: RunWorker) -> None:
    run_id = submit(worker, "orders")
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    worker.instance.report_run_canceling(run)
    assert worker.take(run_id) is None
    assert status(worker, run_id) is DagsterRunStatus.CANCELED


def test_cancel_stops_the_statement_and_holds_the_days(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings, read_table: ReadTable
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    with engine.connect() as other, other.begin(), ThreadPoolExecutor(1) as pool:
        lock_days(other, "public", claim.days)
        executing = pool.submit(worker.execute, held)
        wait_until_blocked(engine)
        with engine.begin() as connection:
            assert leases.request_cancel(connection, held.run.run_id)
        assert worker.heartbeat(held.lease) is leases.LeaseState.CANCEL_REQUESTED
        worker.note_cancel(held)
        while not executing.done():
            held.interruption.request()
        assert [failure.kind for failure in executing.result().failures] == ["permanent"]
    assert status(worker, held.run.run_id) is DagsterRunStatus.CANCELED
    assert read_table("orders").is_empty()
    assert worker.claim() is None
    with engine.connect() as connection:
        held_reason = connection.scalars(sa.select(ledger.c.held_reason).where(ledger.c.asset == "orders")).one()
    assert held_reason == f"run {held.run.run_id} was cancelled"


def test_run_that_does_not_stop_is_abandoned_and_cannot_commit(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, read_table: ReadTable
) -> None:
    raw_data.add_import([{}])
    held = worker.take(submit(worker, "orders"))
    assert held is not None
    with engine.connect() as other, other.begin(), ThreadPoolExecutor(1) as pool:
        lock_days(other, "public", DayRange(date(2026, 1, 5), date(2026, 1, 5)))
        executing = pool.submit(worker.execute, held)
        wait_until_blocked(engine)
        with engine.begin() as connection:
            assert leases.request_cancel(connection, held.run.run_id)
        worker.abandon(held, grace_seconds=0.5)
        assert status(worker, held.run.run_id) is DagsterRunStatus.CANCELED
        other.rollback()
        assert [failure.kind for failure in executing.result().failures] == ["transient"]
    assert read_table("orders").is_empty()


# ---- 运行与工人的代码不一样新 ----------------------------------------------------------


@pytest.fixture(scope="module")
def newer() -> CodeLocation:
    return CodeLocation(module="tests.integration.newer_code", attribute="defs", location_name=LOCATION_NAME)


def submit_newer(worker: RunWorker, newer: CodeLocation, *assets: str) -> str:
    """网页的代码比工人的新：它建的运行里有工人不认识的资产。"""
    day = date(2026, 1, 5)
    tags = {LANE_TAG: "interactive"}
    run = newer.create_run(
        worker.instance, job_name="__ASSET_JOB", run_id=str(uuid4()), assets=assets, days=DayRange(day, day), tags=tags
    )
    enqueue(worker.instance, run)
    return run.run_id


@pytest.mark.parametrize("assets", [("payments",), ("orders", "payments")], ids="+".join)
def test_run_of_an_asset_that_the_worker_does_not_know_fails_with_a_sentence_and_writes_nothing(
    worker: RunWorker, newer: CodeLocation, raw_data: RawData, read_table: ReadTable, assets: tuple[str, ...]
) -> None:
    """代码比运行旧，或者资产后来没有了：运行失败，工人还在。"""
    raw_data.add_import([{}])
    run_id = submit_newer(worker, newer, *assets)
    held = worker.take(run_id)
    assert held is not None
    result = worker.execute(held)
    assert not result.succeeded
    assert "payments" in result.error
    assert "restart the workers" in result.error
    assert status(worker, run_id) is DagsterRunStatus.FAILURE
    assert read_table("orders").is_empty()
    next_one = worker.take(submit(worker, "orders"))
    assert next_one is not None
    assert worker.execute(next_one).succeeded


def test_run_of_an_unknown_asset_whose_worker_died_is_failed_and_the_others_are_looked_after(
    worker: RunWorker, newer: CodeLocation, raw_data: RawData, engine: sa.Engine
) -> None:
    raw_data.add_import([{}])
    unknown, known = submit_newer(worker, newer, "payments"), submit(worker, "orders")
    take_and_begin(worker, unknown, known)
    expire_leases(engine)
    (ring,) = reconcile_runs(worker)
    assert [status(worker, run_id) for run_id in (unknown, known)] == [DagsterRunStatus.FAILURE] * 2
    retry = worker.take(*ring.arguments)
    assert retry is not None
    assert retry.run.parent_run_id == known
    assert worker.execute(retry).succeeded
    assert reconcile_runs(worker) == []


def test_days_in_a_rush_are_rung_for_later_once(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    assert worker.execute(worker.start(claim)).succeeded
    for _ in range(RUSH_IMPORTS + 1):
        announce(engine, etl_settings, raw_data.add_import([{}]))
    later = sa.func.clock_timestamp() + timedelta(hours=1)  # 机器再慢，也还在急雨里
    with engine.begin() as connection:
        connection.execute(sa.update(ledger).values(requested_at=later, materialized_at=later))
    asyncio.run(_ring_in_a_rush(worker, BridgeSettings(nats_url=nats_server.url), monkeypatch))


async def _ring_in_a_rush(worker: RunWorker, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected_tasks(worker, settings, monkeypatch) as broker:
        monkeypatch.setattr(tasks, "RUSH_QUIET_SECONDS", 3600)
        await tasks.materialize_due()
        waiting = broker.state.ringing_later
        await tasks.materialize_due()
        assert broker.state.ringing_later is waiting
        waiting.cancel()
        await asyncio.wait([waiting])
        monkeypatch.setattr(tasks, "RUSH_QUIET_SECONDS", 0)
        await tasks.materialize_due()
        await broker.state.ringing_later
        assert (await broker.js.stream_info(TASKS_STREAM)).state.messages == 1


def test_worker_kept_for_people_does_small_days_and_hands_on_the_rest(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    with engine.begin() as connection:
        request_days(connection, "public", [date(2026, 1, 7)])
    scheduled, clicked = submit(worker, "orders", day="2026-01-08"), submit(worker, "orders", day="2026-01-09")
    settings = BridgeSettings(nats_url=nats_server.url, worker_lanes=("interactive", "small"))
    runs = {scheduled: "event", clicked: "interactive"}
    assert asyncio.run(_serve_people_and_small_days(worker, settings, monkeypatch, runs)) == {
        "interactive": 0,
        "event": 2,
        "bulk": 2,
    }
    assert status(worker, scheduled) is DagsterRunStatus.QUEUED
    assert status(worker, clicked) is DagsterRunStatus.SUCCESS
    with engine.connect() as connection:
        due = sa.select(ledger.c.day).where(ledger.c.asset == "orders", ledger.c.requested > ledger.c.materialized)
        assert list(connection.scalars(due)) == [date(2026, 1, 7)]


async def _serve_people_and_small_days(
    worker: RunWorker, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch, runs: Mapping[str, str]
) -> dict[str, int]:
    """每个运行在自己的车道上来；返回各车道上的门铃：做完的运行敲一次，转给别人的敲一次。"""
    async with connected_tasks(worker, settings, monkeypatch) as broker:
        assert broker.lanes == ("interactive", "event")
        await tasks.materialize_due()
        await tasks.materialize_due()
        for run_id, lane in runs.items():
            message = TaskiqMessage(
                task_id=run_id, task_name=EXECUTE_RUN, labels={"lane": lane}, args=[run_id], kwargs={}
            )
            await tasks.execute_run(run_id, Context(message, broker))
        return dict(await broker.lane_depths())


def test_run_that_cannot_be_buried_does_not_keep_the_others_waiting(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    cursed, other = submit(worker, "orders", day="2026-01-04"), submit(worker, "orders")
    take_and_begin(worker, cursed, other)
    expire_leases(engine)
    report = DagsterInstance.report_run_failed

    def fail(self: DagsterInstance, run: DagsterRun, *arguments: str) -> DagsterEvent:
        if run.run_id == cursed:
            raise KeyError("a snapshot that nobody can read")
        return report(self, run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DagsterInstance, "report_run_failed", fail)
        assert len(reconcile_runs(worker)) == 1
    assert [status(worker, run_id) for run_id in (cursed, other)] == [
        DagsterRunStatus.STARTED,
        DagsterRunStatus.FAILURE,
    ]
    reconcile_runs(worker)
    assert status(worker, cursed) is DagsterRunStatus.FAILURE
