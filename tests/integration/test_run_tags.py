"""运行的标签：列表里看得见的说是谁要的、是什么，其余的 Dagster 收起来；旧版本建的运行照样认得。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterRun

from bridge.queue.doorbell import Doorbell
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs.lanes import lane_of
from bridge.runs.run_queue import TaskQueueRunCoordinator
from bridge.runs.run_reconciler import MAX_RETRIES, reconcile_runs
from bridge.runs.run_tags import tags_of_claim
from bridge.runs.worker import RunWorker
from bridge.warm_dagster.internals import SubmitRunContext
from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import import_tasks
from etl_assets.ledger.claims import AskingEvent, Claim
from etl_assets.ledger.leases import Lease
from etl_assets.ledger.requests import request_days
from etl_assets.testing.raw_data import RawData

from .warm_runs import announce, expire_leases, submit, take_and_begin

DAY = date(2026, 1, 5)


def shown(tags: Mapping[str, str]) -> dict[str, str]:
    """运行列表里看得见的；一天的分区显示在目标旁边。"""
    return {name: value for name, value in tags.items() if not name.startswith((".dagster/", "dagster/"))}


def tags_of(worker: RunWorker, run_id: str) -> Mapping[str, str]:
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    return run.tags


def run_due(worker: RunWorker) -> str:
    claim = worker.claim()
    assert claim is not None
    assert worker.execute(worker.start(claim)).succeeded
    return claim.lease.run_id


def test_run_of_an_import_names_its_file(worker: RunWorker, raw_data: RawData) -> None:
    import_id = raw_data.add_import([{}])
    with worker.engine.begin() as connection:
        connection.execute(sa.update(import_tasks).values(source_name="三月\u202e订单.csv"))
    announce(worker.engine, worker.settings, import_id)
    tags = tags_of(worker, run_due(worker))
    assert shown(tags) == {"user": r"三月\u202e订单.csv"}
    assert tags["dagster/dayline/import_id"] == str(import_id)
    assert tags["dagster/dayline/lane"] == "event"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([None], "import 00000000"),
        (["a.csv", "b.csv", "c.csv"], "a.csv, 2 more"),
        (["x" * 50] * 10, f"{'x' * 39}…, 9 or more others"),
    ],
)
def test_several_files_are_one_short_tag(names: list[str | None], says: str) -> None:
    asked_by = [AskingEvent(str(UUID(int=0)), str(uuid4()), 7, name) for name in names]
    days = DayRange(DAY, date(2026, 1, 7))
    claim = Claim(Lease("r", uuid4()), days, ("orders",), more=False, asked_by=asked_by)
    assert shown(tags_of_claim(claim)) == {"user": says, "days": "2026-01-05..2026-01-07"}


def test_run_that_follows_a_click_on_orders_alone_says_so(worker: RunWorker, raw_data: RawData) -> None:
    announce(worker.engine, worker.settings, raw_data.add_import([{}]))
    run_due(worker)
    clicked = submit(worker, "orders")
    taken = worker.take(clicked)
    assert taken is not None
    assert worker.execute(taken).succeeded
    tags = tags_of(worker, run_due(worker))
    assert shown(tags) == {"user": f"run {clicked[:8]}"}
    assert tags["dagster/dayline/after_run"] == clicked


def test_days_that_somebody_asked_for_are_not_called_an_event_or_a_follower(
    worker: RunWorker, raw_data: RawData
) -> None:
    announce(worker.engine, worker.settings, raw_data.add_import([{}]))
    run_due(worker)
    with worker.engine.begin() as connection:
        request_days(connection, "public", [DAY, date(2026, 1, 6)], asset="customers")
    assert shown(tags_of(worker, run_due(worker))) == {"user": "ledger", "days": "2026-01-05..2026-01-06"}


def submitted(
    worker: RunWorker, monkeypatch: pytest.MonkeyPatch, days: DayRange, tags: Mapping[str, str], of: str | None
) -> DagsterRun:
    """像网页那样建好、提交。"""
    monkeypatch.setattr(Doorbell, "ring", lambda *_: None)
    run = worker.location.create_run(
        worker.instance, job_name="etl", run_id=str(uuid4()), assets=["orders"], days=days, tags=tags, retry_of=of
    )
    coordinator = TaskQueueRunCoordinator()
    coordinator.register_instance(worker.instance)
    return coordinator.submit_run(SubmitRunContext(run, workspace=None))  # type: ignore[arg-type]  # 协调者不看它


def test_click_shows_nothing_of_ours_but_the_days_of_a_range(
    worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = submitted(worker, monkeypatch, DayRange(DAY, DAY), {}, None)
    several = submitted(worker, monkeypatch, DayRange(DAY, date(2026, 1, 7)), {}, None)
    assert (shown(one.tags), shown(several.tags)) == ({}, {"days": "2026-01-05..2026-01-07"})


def test_person_who_runs_it_again_is_not_called_an_event(
    worker: RunWorker, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(worker.engine, worker.settings, raw_data.add_import([{}]))
    first = run_due(worker)
    again = submitted(worker, monkeypatch, DayRange(DAY, DAY), tags_of(worker, first), first)
    assert shown(again.tags) == {"user": "person"}


# ---- 升级以前的运行 -----------------------------------------------------------------

OLD = {"etl/trigger": "event", "etl/lane": "event", "etl/import_id": "1"}


def created_before(worker: RunWorker, **tags: str) -> str:
    """0.1 建的运行：标签是旧的名字。"""
    names = {name: value for name, value in tags.items() if value}
    return worker.location.create_run(
        worker.instance, job_name="etl", run_id=str(uuid4()), assets=["orders"], days=DayRange(DAY, DAY), tags=names
    ).run_id


def test_queued_run_of_the_version_before_is_rung_for_on_its_lane(worker: RunWorker) -> None:
    run_id = created_before(worker, **{"etl/lane": "bulk"})
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    assert lane_of(run) == "bulk"


def test_dead_run_of_the_version_before_is_left_to_the_ledger_if_an_event_asked_for_it(worker: RunWorker) -> None:
    run_id = created_before(worker, **OLD)
    take_and_begin(worker, run_id)
    expire_leases(worker.engine)
    assert {ring.task_name for ring in reconcile_runs(worker)} == {MATERIALIZE_DUE}


def test_dead_run_of_the_version_before_that_a_person_asked_for_is_run_again(worker: RunWorker) -> None:
    run_id = created_before(worker, **{"etl/trigger": "person", "etl/lane": "interactive", "etl/retry": "1"})
    take_and_begin(worker, run_id)
    expire_leases(worker.engine)
    (ring,) = {ring for ring in reconcile_runs(worker) if ring.task_name == EXECUTE_RUN}
    assert ring.lane == "interactive"
    assert tags_of(worker, *ring.arguments)["etl/retry"] == "2"
    last = created_before(worker, **{"etl/lane": "interactive", "etl/retry": str(MAX_RETRIES)})
    take_and_begin(worker, last)
    expire_leases(worker.engine)
    assert [ring for ring in reconcile_runs(worker) if ring.task_name == EXECUTE_RUN] == []


def test_click_on_a_run_of_the_version_before_is_a_click(worker: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = created_before(worker, **OLD)
    again = submitted(worker, monkeypatch, DayRange(DAY, DAY), OLD, first)
    assert lane_of(again) == "interactive"
    assert (again.tags["etl/trigger"], again.tags["dagster/dayline/trigger"]) == ("person", "person")


def test_old_webserver_that_renames_only_the_old_tags_is_believed(worker: RunWorker) -> None:
    """升级到一半：旧的网页重新执行新的工人建的运行，只改得了旧名。"""
    run_id = created_before(
        worker,
        **{"dagster/dayline/trigger": "event", "dagster/dayline/lane": "event"}
        | {"etl/trigger": "person", "etl/lane": "interactive"},
    )
    take_and_begin(worker, run_id)
    expire_leases(worker.engine)
    (ring,) = {ring for ring in reconcile_runs(worker) if ring.task_name == EXECUTE_RUN}
    assert ring.lane == "interactive"
