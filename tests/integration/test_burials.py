"""给死了的运行收尾：一次死亡只算一次，不管几个工人来收、谁停在半路；活着的、还没开始的、做完了的不算死。"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from bridge.queue.task_names import EXECUTE_RUN
from bridge.runs import run_reconciler, tasks
from bridge.runs.run_reconciler import Ring, reconcile_runs
from bridge.runs.worker import RunWorker, TakenRun
from bridge.warm_dagster.code_location import CodeLocation, RunResult
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseUnavailableError, EtlError, TransientError
from etl_assets.core.etl_tables import ledger, outbox
from etl_assets.core.log import RepeatedWarning
from etl_assets.core.settings import EtlSettings
from etl_assets.customers import etl as customers_etl
from etl_assets.ledger import leases
from etl_assets.testing.raw_data import RawData

from .warm_runs import announce, begin, expire_leases, status, submit, take_and_begin


@pytest.fixture(autouse=True)
def no_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_reconciler, "QUIET_SECONDS", 0.0)


@pytest.fixture
def of_person(worker: RunWorker, raw_data: RawData) -> TakenRun:
    raw_data.add_import([{}])
    held = worker.take(submit(worker, "orders", "customers", "leads"))
    assert held is not None
    return held


@pytest.fixture(params=["of_event", "of_person"])
def held(request: pytest.FixtureRequest) -> TakenRun:
    found: TakenRun = request.getfixturevalue(request.param)
    return found


def due(engine: sa.Engine) -> list[tuple[int, str | None]]:
    """到期的日子失败了几次，为什么搁置。"""
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(ledger.c.failures, ledger.c.held_reason).where(ledger.c.requested > ledger.c.materialized)
        )
        return [(row.failures, row.held_reason) for row in rows]


def announced(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return [
            payload["status"]
            for payload in connection.scalars(sa.select(outbox.c.payload).order_by(outbox.c.outbox_id))
        ]


# ---- 一次死亡只算一次 ------------------------------------------------------------------


@contextlib.contextmanager
def stalled_burial(worker: RunWorker, monkeypatch: pytest.MonkeyPatch, owner: object, step: str) -> Iterator[None]:
    """一个工人收尾到这一步停住了，它开着的事务都断了；离开时它醒来，接着做。"""
    stalled, awake = threading.Event(), threading.Event()
    do = getattr(owner, step)

    def stall(*arguments: Any, **named: Any) -> Any:
        if not stalled.is_set():
            stalled.set()
            assert awake.wait(30)
        return do(*arguments, **named)

    monkeypatch.setattr(owner, step, stall)
    engine = build_engine(worker.settings)
    with ThreadPoolExecutor(1) as pool:
        burial = pool.submit(reconcile_runs, replace(worker, engine=engine))
        try:
            assert stalled.wait(10)
            with worker.engine.begin() as connection:
                connection.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND state = 'idle in transaction'"
                )
            yield
        finally:
            awake.set()
        with contextlib.suppress(EtlError):
            burial.result(20)
    engine.dispose()


@pytest.mark.parametrize("is_held", [True, False], ids=["leased", "without a lease"])
def test_death_counts_once_though_a_stalled_burial_was_taken_over(
    worker: RunWorker, of_event: TakenRun, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE etl.leases SET expires_at = clock_timestamp()" if is_held else "DELETE FROM etl.leases"
        )
    with stalled_burial(worker, monkeypatch, DagsterInstance, "report_run_failed"):
        reconcile_runs(worker)
    assert due(engine) == [(1, None)]
    assert announced(engine) == ["failed"]
    assert status(worker, of_event.run.run_id) is DagsterRunStatus.FAILURE


@pytest.mark.parametrize("is_held", [True, False], ids=["leased", "without a lease"])
def test_stalled_burial_of_a_cancelled_run_holds_no_day_that_something_asked_for_meanwhile(
    worker: RunWorker,
    of_event: TakenRun,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
    is_held: bool,
) -> None:
    worker.instance.report_run_canceling(of_event.run)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE etl.leases SET expires_at = clock_timestamp()" if is_held else "DELETE FROM etl.leases"
        )
    with stalled_burial(worker, monkeypatch, run_reconciler, "hold_days"):
        reconcile_runs(worker)
        assert due(engine) == [(0, f"run {of_event.run.run_id} was cancelled")]
        announce(engine, etl_settings, raw_data.add_import([{}]))
    assert due(engine) == [(0, None)]
    assert status(worker, of_event.run.run_id) is DagsterRunStatus.CANCELED


# ---- 停顿之后 --------------------------------------------------------------------------


async def freeze_database(engine: sa.Engine, seconds: float) -> None:
    """没有人续得了租，也没有人读得到租约。"""

    def freeze() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE etl.leases IN ACCESS EXCLUSIVE MODE")
            time.sleep(seconds)

    await asyncio.to_thread(freeze)


async def freeze_process(_engine: sa.Engine, seconds: float) -> None:
    time.sleep(seconds)  # 停住事件循环，像 SIGSTOP 那样


@pytest.mark.parametrize("freeze", [freeze_database, freeze_process])
async def test_first_look_after_a_pause_buries_nobody(
    worker: RunWorker,
    of_event: TakenRun,
    engine: sa.Engine,
    monkeypatch: pytest.MonkeyPatch,
    freeze: Callable[..., Any],
) -> None:
    """停得比租约久：所有租约都过期了，活着的还来不及收尾。"""
    looks: list[str] = []

    def look(worker: RunWorker, **named: float) -> list[Ring]:
        try:
            rings = reconcile_runs(worker, **named)
        except TransientError:
            looks.append("too late")
            raise
        looks.append(f"buried {len(rings)}")
        return rings

    async def no_ring(*_: object) -> None:
        pass

    monkeypatch.setattr(tasks, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(tasks, "reconcile_runs", look)
    monkeypatch.setattr(tasks, "_ring", no_ring)
    short = replace(worker, lease_seconds=2)
    looking = asyncio.create_task(tasks._reconcile(short))
    try:
        async with asyncio.timeout(20):
            while not looks:
                await asyncio.sleep(0.01)
            assert short.heartbeat(of_event.lease) is leases.LeaseState.VALID
            looks.clear()
            await freeze(engine, 2.2)
            while "buried 1" not in looks:
                await asyncio.sleep(0.01)
    finally:
        looking.cancel()
        short.heartbeats.dispose()
    assert "too late" in looks
    assert due(engine) == [(1, None)]


# ---- 醒来的 ----------------------------------------------------------------------------


def take_over(worker: RunWorker, engine: sa.Engine, run_id: str) -> TakenRun:
    """做它的停得比租约久，别人接手了。"""
    expire_leases(engine)
    reconcile_runs(worker)
    other = worker.take(run_id)
    assert other is not None
    return other


def test_worker_that_thaws_before_it_began_writes_nothing_about_a_run_that_another_has_done(
    worker: RunWorker, of_person: TakenRun, engine: sa.Engine
) -> None:
    run_id = of_person.run.run_id
    assert worker.execute(take_over(worker, engine, run_id)).succeeded
    written = worker.instance.all_logs(run_id)
    thawed = replace(
        of_person, lease=replace(of_person.lease, asked_at=of_person.lease.asked_at - worker.lease_seconds)
    )
    assert not worker.execute(thawed).succeeded
    assert worker.instance.all_logs(run_id) == written
    assert status(worker, run_id) is DagsterRunStatus.SUCCESS
    assert announced(engine) == ["success"] * 3


def test_error_of_a_thawed_worker_does_not_end_the_run_that_another_is_executing(
    worker: RunWorker, of_person: TakenRun, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = of_person.run.run_id

    def freeze(*_: object) -> RunResult:
        take_over(worker, engine, run_id)
        begin(worker, run_id)
        raise DatabaseUnavailableError("its connection was cut while it was frozen")

    monkeypatch.setattr(CodeLocation, "execute_run", freeze)
    assert not worker.execute(of_person).succeeded
    assert status(worker, run_id) is DagsterRunStatus.STARTED


def test_run_that_was_created_after_its_lease_was_buried_does_not_stay_unfinished(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """领了日子就停住：收尾的人来的时候还没有运行，别人领走了日子。"""
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    expire_leases(engine)
    reconcile_runs(worker)
    again = worker.claim()
    assert again is not None
    frozen = worker.start(claim)
    assert not worker.execute(frozen).succeeded
    assert status(worker, frozen.run.run_id) is DagsterRunStatus.FAILURE
    assert worker.execute(worker.start(again)).succeeded
    assert announced(engine) == ["success"] * 3


# ---- 还没开始的 ------------------------------------------------------------------------


def test_click_is_not_lost_though_its_run_cannot_be_begun_again_and_again(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    run_id = submit(worker, "orders")

    def away(*_: object) -> None:
        raise DatabaseUnavailableError("away for a moment")

    with monkeypatch.context() as patch:
        patch.setattr("bridge.runs.worker.report_starting", away)
        for _ in range(run_reconciler.MAX_RETRIES + 1):
            with pytest.raises(DatabaseUnavailableError):
                worker.take(run_id)
    held = worker.take(run_id)
    assert held is not None
    assert worker.execute(held).succeeded
    assert announced(engine) == ["success"]


def test_run_whose_worker_died_before_it_began_waits_in_the_queue_again(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine
) -> None:
    raw_data.add_import([{}])
    run_id = submit(worker, "orders")
    for _ in range(run_reconciler.MAX_RETRIES + 1):
        assert worker.take(run_id) is not None
        expire_leases(engine)
        assert Ring(EXECUTE_RUN, "interactive", (run_id,)) in reconcile_runs(worker)
    held = worker.take(run_id)
    assert held is not None
    assert worker.execute(held).succeeded
    assert announced(engine) == ["success"]


# ---- 做完了的 --------------------------------------------------------------------------


def test_run_cut_off_after_its_last_commit_announces_no_failure(
    worker: RunWorker, held: TakenRun, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = CodeLocation.execute_run

    def cut(self: CodeLocation, instance: DagsterInstance, run: DagsterRun) -> RunResult:
        execute(self, instance, run)
        raise DatabaseUnavailableError("cut while it wrote RUN_SUCCESS")

    monkeypatch.setattr(CodeLocation, "execute_run", cut)
    assert not worker.execute(held).succeeded
    assert due(engine) == []
    assert announced(engine) == ["success"] * 3


def test_burial_of_a_run_that_had_committed_everything_announces_no_failure(
    worker: RunWorker, held: TakenRun, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunWorker, "_finish", die)
        with pytest.raises(SystemExit):
            worker.execute(held)
    begin(worker, held.run.run_id)  # 死在写下 RUN_SUCCESS 之前
    expire_leases(engine)
    reconcile_runs(worker)
    assert status(worker, held.run.run_id) is DagsterRunStatus.FAILURE
    assert due(engine) == []
    assert announced(engine) == ["success"] * 3


def test_burial_announces_the_failure_of_the_first_asset_that_was_not_committed(
    worker: RunWorker, held: TakenRun, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(customers_etl, "write_customers", die)
        patch.setattr(RunWorker, "_finish", die)
        with pytest.raises(SystemExit):
            worker.execute(held)
    begin(worker, held.run.run_id)
    expire_leases(engine)
    reconcile_runs(worker)
    with engine.connect() as connection:
        events = connection.execute(
            sa.select(outbox.c.asset, outbox.c.payload["status"].astext).order_by(outbox.c.outbox_id)
        ).all()
    assert events == [("orders", "success"), ("customers", "failed")]


# ---- 一分钟一句 ------------------------------------------------------------------------


def test_runs_that_cannot_be_buried_are_one_line_a_minute(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    take_and_begin(worker, *(submit(worker, "orders", day=f"2026-01-0{day}") for day in (4, 5, 6)))
    expire_leases(engine)

    def fail(*_: object) -> None:
        raise KeyError("a snapshot that nobody can read")

    monkeypatch.setattr(DagsterInstance, "report_run_failed", fail)
    with structlog.testing.capture_logs() as logs:
        monkeypatch.setattr(
            run_reconciler, "_cannot_bury", RepeatedWarning(structlog.get_logger(), "cannot bury", level="error")
        )
        reconcile_runs(worker)
    assert [line["event"] for line in logs].count("cannot bury") == 1
