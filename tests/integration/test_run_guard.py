"""看着运行的人：Dagster 的表写不了、锁着，租约照样续，取消照样看得见；停不下来的进程无论如何都换。"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from bridge.queue.broker import SafeJetStreamBroker
from bridge.runs import run_reconciler, tasks
from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker, TakenRun
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)
from bridge.warm_dagster import instance as dagster_instance
from bridge.warm_dagster.instance import open_instance
from bridge.warm_dagster.internals import context_creation_job
from bridge.warm_dagster.runs import report_starting
from etl_assets.core.business_day import DayRange
from etl_assets.core.interruption import Interruption
from etl_assets.core.log import RepeatedWarning
from etl_assets.core.settings import EtlSettings
from etl_assets.customers import etl as customers_etl
from etl_assets.ledger import leases
from etl_assets.ledger.locks import lock_days
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData

from .warm_runs import announce, expire_leases, status, submit, wait_until_blocked

DAY = DayRange(date(2026, 1, 5), date(2026, 1, 5))


@pytest.fixture(autouse=True)
def broker(monkeypatch: pytest.MonkeyPatch) -> SafeJetStreamBroker:
    """没有连 NATS：只有它的设置，与它记着的要不要换进程。"""
    broker = SafeJetStreamBroker(BridgeSettings(nats_url="nats://127.0.0.1:1", cancel_grace_seconds=5))
    broker.state.unpublished = asyncio.Event()
    monkeypatch.setattr(tasks, "broker", broker)
    return broker


@asynccontextmanager
async def blocked(worker: RunWorker) -> AsyncIterator[tuple[TakenRun, asyncio.Task[None]]]:
    """一个正在执行的运行，等着别人占着的一天。"""
    with worker.engine.connect() as other, other.begin():
        lock_days(other, "public", DAY)
        held = worker.take(submit(worker, "orders"))
        assert held is not None
        executing = asyncio.create_task(tasks._execute(worker, held))
        await asyncio.to_thread(wait_until_blocked, worker.engine)
        yield held, executing


def fail(*_arguments: object, **_named: object) -> None:
    raise RuntimeError("Dagster's storage is not there")


@pytest.mark.parametrize(
    "statement",
    ["UPDATE etl.leases SET cancel_requested_at = clock_timestamp()", "DELETE FROM etl.leases"],
    ids=["cancel", "lost lease"],
)
async def test_cancel_and_lost_lease_are_seen_though_events_cannot_be_written(
    worker: RunWorker, broker: SafeJetStreamBroker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    raw_data.add_import([{}])
    monkeypatch.setattr("bridge.runs.worker.flush_events", fail)
    async with blocked(worker) as (_, executing):
        with worker.engine.begin() as connection:
            connection.exec_driver_sql(statement)
        await asyncio.wait({executing}, timeout=4)
        assert executing.done()
    assert not broker.replacing


async def test_lease_that_a_run_gave_back_itself_is_not_said_to_be_lost(
    worker: RunWorker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """放下租约与收场之间的心跳：运行做完了，什么也没有归别人。"""
    raw_data.add_import([{}])
    finish, beats = RunWorker._finish, RunWorker.heartbeat
    seen: list[leases.LeaseState] = []

    def finish_slowly(self: RunWorker, *arguments: Any) -> None:
        finish(self, *arguments)
        deadline = time.monotonic() + 20
        while leases.LeaseState.LOST not in seen and time.monotonic() < deadline:
            time.sleep(0.05)

    def heartbeat(self: RunWorker, lease: leases.Lease) -> leases.LeaseState:
        seen.append(beats(self, lease))
        return seen[-1]

    monkeypatch.setattr(RunWorker, "_finish", finish_slowly)
    monkeypatch.setattr(RunWorker, "heartbeat", heartbeat)
    held = worker.take(submit(worker, "orders"))
    assert held is not None
    with structlog.testing.capture_logs() as logs:
        await tasks._execute(worker, held)
    assert leases.LeaseState.LOST in seen
    assert [log["event"] for log in logs if log["log_level"] != "info"] == []


async def test_cancel_that_cannot_be_noted_at_first_stops_the_run_with_its_grace(
    worker: RunWorker, broker: SafeJetStreamBroker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    attempts: list[int] = []
    note_cancel = RunWorker.note_cancel

    def note(self: RunWorker, held: TakenRun) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            fail()
        note_cancel(self, held)

    monkeypatch.setattr(RunWorker, "note_cancel", note)
    monkeypatch.setattr(Interruption, "request", delayed(Interruption.request, calls=5))
    async with blocked(worker) as (held, executing):
        with worker.engine.begin() as connection:
            assert leases.request_cancel(connection, held.run.run_id)
        await asyncio.wait_for(executing, 10)
    assert (broker.replacing, len(attempts)) == (False, 2)
    assert status(worker, held.run.run_id) is DagsterRunStatus.CANCELED


async def test_runs_whose_leases_cannot_be_extended_are_one_line_a_minute(
    worker: RunWorker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    monkeypatch.setattr(RunWorker, "heartbeat", fail)
    with structlog.testing.capture_logs() as logs:
        monkeypatch.setattr(tasks, "_cannot_extend", RepeatedWarning(structlog.get_logger(), "cannot extend"))
        for day in ("2026-01-05", "2026-01-06"):
            held = worker.take(submit(worker, "orders", day=day))
            assert held is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(tasks._guard(worker, held), 2.5 * tasks.HEARTBEAT_SECONDS)
    assert [line["event"] for line in logs].count("cannot extend") == 1


async def test_lease_that_a_run_puts_down_itself_has_not_gone_to_another(
    worker: RunWorker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    finish = RunWorker._finish

    def slowly(self: RunWorker, *arguments: Any) -> None:
        finish(self, *arguments)
        time.sleep(3 * tasks.HEARTBEAT_SECONDS)

    monkeypatch.setattr(RunWorker, "_finish", slowly)
    held = worker.take(submit(worker, "orders"))
    assert held is not None
    with structlog.testing.capture_logs() as logs:
        await asyncio.wait_for(tasks._execute(worker, held), 20)
    assert status(worker, held.run.run_id) is DagsterRunStatus.SUCCESS
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == []


def delayed(request: object, *, calls: int) -> object:
    """头几次不响应的取消。"""
    made: list[int] = []

    def later(self: Interruption) -> None:
        made.append(1)
        if len(made) > calls:
            request(self)  # type: ignore[operator]  # 换下来的方法

    return later


@pytest.mark.parametrize("abandon", [fail, lambda *_, **__: time.sleep(3)], ids=["fails", "hangs"])
async def test_process_is_replaced_whatever_becomes_of_abandoning_its_run(
    worker: RunWorker, broker: SafeJetStreamBroker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, abandon: object
) -> None:
    raw_data.add_import([{}])
    monkeypatch.setattr(RunWorker, "abandon", abandon)
    monkeypatch.setattr(Interruption, "request", lambda _self: None)
    monkeypatch.setattr(tasks, "_ABANDON_SECONDS", 0.2)
    monkeypatch.setattr(broker, "settings", broker.settings.model_copy(update={"cancel_grace_seconds": 0.1}))
    async with blocked(worker) as (held, executing):
        with worker.engine.begin() as connection:
            assert leases.request_cancel(connection, held.run.run_id)
        await asyncio.wait_for(executing, 3)
        assert broker.replacing


# ---- 真的存储 --------------------------------------------------------------------------


@pytest.fixture
def instance(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    """真的存储，像工人那样打开。"""
    write_dagster_home(tmp_path / "home")
    silenced = dagster_instance._CONSOLE_LOGGERS  # 打开实例会换掉它，整个进程都受影响：之后换回来
    monkeypatch.setattr(context_creation_job, silenced, getattr(context_creation_job, silenced))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(
        "DAGSTER_POSTGRES_URL", build_dagster_postgres_url(engine.url.render_as_string(hide_password=False))
    )
    create_dagster_storage(
        engine, schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=tmp_path / "migrate.log"
    )
    with open_instance() as instance:
        yield instance


@pytest.fixture
def real(worker: RunWorker, instance: DagsterInstance) -> Iterator[RunWorker]:
    """真的存储上的工人。"""
    real = replace(worker, instance=instance)
    yield real
    real.heartbeats.dispose()


@pytest.fixture
def short_lived(real: RunWorker) -> Iterator[RunWorker]:
    """租约只有一秒的工人。"""
    short_lived = replace(real, lease_seconds=1)
    yield short_lived
    short_lived.heartbeats.dispose()


def test_runs_do_not_configure_logging_anew(instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """两个运行同时在一个进程里时，那会死锁。"""
    monkeypatch.setattr("logging.config.dictConfig", lambda _config: pytest.fail("logging is configured again"))
    assert len(instance.get_handlers()) == 1


# ---- 停得比租约久的，醒来 ------------------------------------------------------------


@pytest.fixture(autouse=True)
def stopped_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """测试里停的那一下不到一秒：当它更久。"""
    monkeypatch.setattr(leases, "_FRESH_SECONDS", 0.0)


def cancel_and_bury(worker: RunWorker, engine: sa.Engine, run_id: str) -> None:
    """做它的停住了：人取消了它，别人收了尾。"""
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    worker.instance.report_run_canceling(run)
    with engine.begin() as connection:
        assert leases.request_cancel(connection, run_id)
    expire_leases(engine)
    reconcile_runs(worker)
    assert status(worker, run_id) is DagsterRunStatus.CANCELED


def let_another_do_it(worker: RunWorker, engine: sa.Engine, run_id: str) -> None:
    expire_leases(engine)
    reconcile_runs(worker)
    other = worker.take(run_id)
    assert other is not None
    assert worker.execute(other).succeeded


def test_run_that_was_cancelled_and_buried_while_its_worker_was_frozen_stays_cancelled(
    real: RunWorker, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    held = real.take(submit(real, "orders", "customers"))
    assert held is not None
    write = customers_etl.write_customers

    def freeze(*arguments: Any, **named: Any) -> Any:
        cancel_and_bury(real, engine, held.run.run_id)
        return write(*arguments, **named)

    monkeypatch.setattr(customers_etl, "write_customers", freeze)
    assert not real.execute(held).succeeded
    assert status(real, held.run.run_id) is DagsterRunStatus.CANCELED


@pytest.mark.parametrize(
    ("meanwhile", "end"),
    [(cancel_and_bury, DagsterRunStatus.CANCELED), (let_another_do_it, DagsterRunStatus.SUCCESS)],
    ids=["cancelled", "done by another"],
)
def test_run_that_ended_while_a_worker_was_about_to_begin_it_is_not_begun_again(
    real: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[RunWorker, sa.Engine, str], None],
    end: DagsterRunStatus,
) -> None:
    """它停在读状态与标 STARTING 之间；标了就死的话，对账者会敲门，谁都可能再做一遍。"""
    raw_data.add_import([{}])
    run_id = submit(real, "orders")

    def freeze(instance: DagsterInstance, run: DagsterRun) -> DagsterRun:
        monkeypatch.setattr("bridge.runs.worker.report_starting", report_starting)
        meanwhile(real, engine, run_id)
        return report_starting(instance, run)

    monkeypatch.setattr(run_reconciler, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr("bridge.runs.worker.report_starting", freeze)
    assert real.take(run_id) is None
    assert status(real, run_id) is end
    assert reconcile_runs(real) == []


# ---- 锁着的 event_logs -----------------------------------------------------------------


@contextmanager
def locked_event_log(engine: sa.Engine, seconds: float) -> Iterator[None]:
    """CREATE INDEX 拿的锁，过一会儿自己放。"""
    locked = threading.Event()

    def hold() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE dagster.event_logs IN SHARE MODE")
            locked.set()
            time.sleep(seconds)

    holding = threading.Thread(target=hold)
    holding.start()
    assert locked.wait(10)
    yield
    holding.join()


async def test_lock_on_the_event_log_for_longer_than_the_lease_buries_no_run(
    short_lived: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    read_table: ReadTable,
) -> None:
    """锁住的时候正在开始的、正在执行的，都活着。"""
    raw_data.add_import([{}])
    clicked = submit(short_lived, "orders", day="2026-01-06")

    async def start_one() -> TakenRun:
        claim = await asyncio.to_thread(short_lived.claim)
        assert claim is not None
        held = await asyncio.to_thread(short_lived.start, claim)
        await tasks._execute(short_lived, held)
        return held

    async def take_one() -> TakenRun:
        held = await asyncio.to_thread(short_lived.take, clicked)
        assert held is not None
        await tasks._execute(short_lived, held)
        return held

    async def no_lease_expires(seconds: float) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for _ in range(int(seconds * 10)):
                await asyncio.sleep(0.1)
                assert leases.read_expired_leases(connection, "public") == []

    async with blocked(short_lived) as (held, executing):
        with locked_event_log(engine, 3):
            await no_lease_expires(2.5)
    await asyncio.wait_for(executing, 30)
    assert status(short_lived, held.run.run_id) is DagsterRunStatus.SUCCESS

    announce(engine, etl_settings, raw_data.add_import([{}]))
    with locked_event_log(engine, 3):
        working = asyncio.gather(start_one(), take_one())
        await no_lease_expires(2.5)
    done = await asyncio.wait_for(working, 30)
    assert [status(short_lived, held.run.run_id) for held in done] == [DagsterRunStatus.SUCCESS] * 2
    assert await asyncio.to_thread(reconcile_runs, short_lived) == []
    assert read_table("orders").height == 1
