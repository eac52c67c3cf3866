"""人取消的、人重新执行的：工人死了也照人的意思办。"""

from __future__ import annotations

from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterRun, DagsterRunStatus

from bridge.queue.doorbell import Doorbell
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs import run_reconciler
from bridge.runs.lanes import LANE_TAG
from bridge.runs.run_queue import TaskQueueRunCoordinator
from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker, TakenRun
from bridge.settings import Lane
from bridge.warm_dagster.internals import RETRY_NUMBER_TAG, SubmitRunContext
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger import leases
from etl_assets.orchestration.run_tags import EVENT, TRIGGER_TAG
from etl_assets.testing.raw_data import RawData

from .warm_runs import announce, expire_leases, status, submit, take_and_begin


@pytest.fixture(autouse=True)
def no_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_reconciler, "QUIET_SECONDS", 0.0)


# ---- 取消 ------------------------------------------------------------------------


def held_reasons(engine: sa.Engine) -> set[str | None]:
    with engine.connect() as connection:
        return set(
            connection.scalars(sa.select(ledger.c.held_reason).where(ledger.c.requested > ledger.c.materialized))
        )


@pytest.mark.parametrize("seen_as", ["CANCELING", "STARTED", "CANCELED"])
def test_days_of_a_cancelled_run_are_held_though_its_worker_died(
    worker: RunWorker, of_event: TakenRun, engine: sa.Engine, seen_as: str
) -> None:
    """工人死的时候，Dagster 里是正在取消、取消的标记被盖掉了、或者已经标好了。"""
    with engine.begin() as connection:
        assert leases.request_cancel(connection, of_event.run.run_id)
    if seen_as != "STARTED":
        worker.instance.report_run_canceling(of_event.run)
    if seen_as == "CANCELED":
        worker.instance.report_run_canceled(of_event.run)
    expire_leases(engine)
    assert [ring.task_name for ring in reconcile_runs(worker)] == [MATERIALIZE_DUE]
    assert status(worker, of_event.run.run_id) is DagsterRunStatus.CANCELED
    assert held_reasons(engine) == {f"run {of_event.run.run_id} was cancelled"}
    assert worker.claim() is None
    assert reconcile_runs(worker) == []


def test_days_of_a_cancelled_run_without_a_lease_are_held(
    worker: RunWorker, of_event: TakenRun, engine: sa.Engine
) -> None:
    worker.instance.report_run_canceling(of_event.run)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM etl.leases")
    assert reconcile_runs(worker) == []
    assert status(worker, of_event.run.run_id) is DagsterRunStatus.CANCELED
    assert held_reasons(engine) == {f"run {of_event.run.run_id} was cancelled"}


def test_cancelled_run_that_had_only_been_taken_holds_the_days_that_were_due(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    announce(engine, etl_settings, raw_data.add_import([{}]))
    held = worker.take(submit(worker, "orders", "customers", "leads"))
    assert held is not None
    worker.instance.report_run_canceling(held.run)
    expire_leases(engine)
    reconcile_runs(worker)
    assert held_reasons(engine) == {f"run {held.run.run_id} was cancelled"}


def test_run_cancelled_in_the_queue_holds_nothing(
    worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """那一天是事件要的，不是这个运行要的。"""
    announce(engine, etl_settings, raw_data.add_import([{}]))
    run = worker.instance.get_run_by_id(submit(worker, "orders"))
    assert run is not None
    worker.instance.report_run_canceling(run)
    assert reconcile_runs(worker) == []
    assert status(worker, run.run_id) is DagsterRunStatus.CANCELED
    assert held_reasons(engine) == {None}


# ---- 重新执行 ----------------------------------------------------------------------


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Lane]]:
    """敲过的门。"""
    rung: list[tuple[str, Lane]] = []
    monkeypatch.setattr(Doorbell, "ring", lambda _self, run_id, lane: rung.append((run_id, lane)))
    return rung


def run_again(worker: RunWorker, of_event: TakenRun, **tags: str) -> DagsterRun:
    """像网页与 Dagster 的重试那样：标签照抄，经协调者提交。"""
    assert worker.execute(of_event).succeeded
    assert of_event.days is not None
    copied = {**of_event.run.tags, run_reconciler.RETRY_TAG: "3", **tags}
    run = worker.location.create_run(
        worker.instance,
        job_name="etl",
        run_id=str(uuid4()),
        assets=of_event.assets,
        days=of_event.days,
        tags=copied,
        retry_of=of_event.run.run_id,
    )
    coordinator = TaskQueueRunCoordinator()
    coordinator.register_instance(worker.instance)
    submitted = coordinator.submit_run(SubmitRunContext(run, workspace=None))  # type: ignore[arg-type]  # 协调者不看它
    assert submitted.status is DagsterRunStatus.QUEUED
    return submitted


def test_person_who_runs_an_events_run_again_is_served_first_and_the_run_is_retried(
    worker: RunWorker, of_event: TakenRun, engine: sa.Engine, rung: list[tuple[str, Lane]]
) -> None:
    run = run_again(worker, of_event)
    assert rung == [(run.run_id, "interactive")]
    assert run.tags[LANE_TAG] == "interactive"
    assert run.tags[TRIGGER_TAG] != EVENT
    take_and_begin(worker, run.run_id)
    expire_leases(engine)
    (ring,) = set(reconcile_runs(worker))
    assert (ring.task_name, ring.lane) == (EXECUTE_RUN, "interactive")
    retry = worker.take(*ring.arguments)
    assert retry is not None
    assert retry.run.parent_run_id == run.run_id
    assert worker.execute(retry).succeeded


def test_lane_that_the_person_chose_is_kept(
    worker: RunWorker, of_event: TakenRun, rung: list[tuple[str, Lane]]
) -> None:
    run = run_again(worker, of_event, **{LANE_TAG: "bulk"})
    assert rung == [(run.run_id, "bulk")]


def test_retry_of_the_machine_keeps_its_origin(
    worker: RunWorker, of_event: TakenRun, rung: list[tuple[str, Lane]]
) -> None:
    run = run_again(worker, of_event, **{RETRY_NUMBER_TAG: "1"})
    assert rung == [(run.run_id, "event")]
    assert run.tags[TRIGGER_TAG] == EVENT
