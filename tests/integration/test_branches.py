"""图有分叉：一个运行做两个分支，一个失败了另一个照样做完；只有失败的与排在它后面的重来。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker, TakenRun
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.code_location_name import LOCATION_NAME
from etl_assets.core.errors import DatabaseUnavailableError, PermanentError
from etl_assets.core.etl_tables import ledger, outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.customers import etl as customers_etl
from etl_assets.ledger.requests import request_days
from etl_assets.reports.progress import import_progress
from etl_assets.testing.raw_data import RawData
from tests.integration.engine import extra_assets

from .warm_runs import announce, begin, expire_leases, status, submit, take_and_begin, warm_worker

EVERYTHING = ("orders", "customers", "products", "daily_report", "leads")


@pytest.fixture(scope="module")
def forked() -> CodeLocation:
    return CodeLocation(module="tests.integration.forked_code", attribute="defs", location_name=LOCATION_NAME)


@pytest.fixture(scope="module")
def older_code() -> CodeLocation:
    return CodeLocation(module="tests.integration.forked_code", attribute="older", location_name=LOCATION_NAME)


@pytest.fixture
def worker(
    forked: CodeLocation, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunWorker]:
    extra_assets.extras.create(engine)
    with warm_worker(forked, engine, etl_settings, tmp_path, monkeypatch) as worker:
        worker.write_graph()
        yield worker


@pytest.fixture
def import_id(worker: RunWorker, raw_data: RawData) -> UUID:
    import_id = raw_data.add_import([{}])
    announce(worker.engine, worker.settings, import_id)
    return import_id


def claimed(worker: RunWorker) -> TakenRun:
    claim = worker.claim()
    assert claim is not None
    return worker.start(claim)


def fail(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: Exception) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, broken)


def entries(engine: sa.Engine) -> dict[str, sa.Row[Any]]:
    with engine.connect() as connection:
        return {row.asset: row for row in connection.execute(sa.select(ledger).where(ledger.c.day == date(2026, 1, 5)))}


def due(engine: sa.Engine) -> set[str]:
    return {asset for asset, row in entries(engine).items() if row.requested > row.materialized}


def announced(engine: sa.Engine) -> list[tuple[str, str, str]]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(outbox.c.asset, outbox.c.payload).order_by(outbox.c.outbox_id))
        return [(asset, payload["status"], payload["downstream"]) for asset, payload in rows]


def progress(worker: RunWorker, import_id: UUID) -> tuple[int, int, int]:
    with worker.engine.connect() as connection:
        found = import_progress(connection, worker.settings, import_id)
    return found.days, found.done, found.held


def test_one_run_makes_both_branches_and_the_import_is_done_when_all_are(worker: RunWorker, import_id: UUID) -> None:
    held = claimed(worker)
    assert held.assets == EVERYTHING
    assert progress(worker, import_id) == (1, 0, 0)
    assert worker.execute(held).succeeded
    assert due(worker.engine) == set()
    assert progress(worker, import_id) == (1, 1, 0)
    assert {asset: rest for asset, *rest in announced(worker.engine)} == {
        "orders": ["success", "included"],
        "customers": ["success", "included"],
        "products": ["success", "included"],
        "leads": ["success", "pending"],
        "daily_report": ["success", "pending"],
    }


def test_branch_goes_on_while_the_other_fails(
    worker: RunWorker, import_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        fail(broken, extra_assets, "_content", ValueError("no luck"))
        result = worker.execute(held := claimed(worker))
    assert [(failure.asset, failure.kind) for failure in result.failures] == [("products", "unknown")]
    found = entries(worker.engine)
    assert due(worker.engine) == {"products"}
    assert {asset: row.failures for asset, row in found.items()} == dict.fromkeys(EVERYTHING, 0) | {"products": 1}
    assert [event for event in announced(worker.engine) if event[1] != "success"] == [("products", "failed", "pending")]
    assert progress(worker, import_id) == (1, 0, 0)
    with worker.engine.begin() as connection:
        connection.execute(sa.update(ledger).values(retry_at=None))
    again = claimed(worker)
    assert (again.assets, again.run.parent_run_id) == (("products", "daily_report"), held.run.run_id)
    assert worker.execute(again).succeeded
    assert progress(worker, import_id) == (1, 1, 0)
    assert entries(worker.engine)["leads"].run_id == held.run.run_id


def test_join_behind_two_failed_branches_fails_once(
    worker: RunWorker, import_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.execute(claimed(worker)).succeeded
    with worker.engine.begin() as connection:
        request_days(connection, "public", [date(2026, 1, 5)], asset="daily_report")
        request_days(connection, "public", [date(2026, 1, 5)])
    fail(monkeypatch, extra_assets, "_content", ValueError("bad products"))
    fail(monkeypatch, customers_etl, "transform", ValueError("bad customers"))
    result = worker.execute(claimed(worker))
    assert {failure.asset for failure in result.failures} == {"products", "customers"}
    assert entries(worker.engine)["daily_report"].failures == 1
    assert progress(worker, import_id).count(0) >= 1


def test_two_branches_fail_each_in_its_way(worker: RunWorker, import_id: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, extra_assets, "_content", PermanentError("bad products"))
    fail(monkeypatch, customers_etl, "transform", ValueError("bad customers"))
    result = worker.execute(claimed(worker))
    assert {failure.asset for failure in result.failures} == {"customers", "products"}
    found = entries(worker.engine)
    assert found["products"].held_reason.endswith("bad products")
    assert found["products"].retry_at is None
    assert found["customers"].held_reason is None
    assert found["customers"].retry_at is not None
    assert due(worker.engine) == {"customers", "products"}
    failed = [asset for asset, status, _ in announced(worker.engine) if status == "failed"]
    assert sorted(failed) == ["customers", "products"]
    assert progress(worker, import_id) == (1, 0, 1)


@pytest.mark.usefixtures("import_id")
def test_held_branch_does_not_stop_the_other(worker: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, extra_assets, "_content", PermanentError("bad products"))
    fail(monkeypatch, customers_etl, "transform", ValueError("bad customers"))
    worker.execute(claimed(worker))
    monkeypatch.undo()
    with worker.engine.begin() as connection:
        connection.execute(sa.update(ledger).values(retry_at=None))
    again = claimed(worker)
    assert again.assets == ("customers", "leads")


def test_rerun_of_customers_alone_leaves_what_follows_due_and_the_other_branch_done(
    worker: RunWorker, import_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.execute(claimed(worker)).succeeded
    monkeypatch.setattr("etl_assets.orchestration.resources.get_engine", lambda: worker.engine)
    held = worker.take(run_id := submit(worker, "customers"))
    assert held is not None
    assert worker.execute(held).succeeded
    assert due(worker.engine) == {"leads", "daily_report"}
    found = entries(worker.engine)
    assert found["customers"].run_id == run_id
    assert found["products"].run_id != run_id
    follow = claimed(worker)
    assert follow.assets == ("daily_report", "leads")
    assert worker.execute(follow).succeeded
    assert (due(worker.engine), progress(worker, import_id)) == (set(), (1, 1, 0))


def test_dead_run_of_a_person_is_retried_for_what_it_had_not_made(worker: RunWorker, import_id: UUID) -> None:  # noqa: ARG001
    run_id = submit(worker, *EVERYTHING)
    take_and_begin(worker, run_id)
    expire_leases(worker.engine)
    rings = reconcile_runs(worker)
    assert status(worker, run_id).value == "FAILURE"
    (retry_id,) = [argument for ring in rings for argument in ring.arguments]
    held = worker.take(retry_id)
    assert held is not None
    assert held.assets == EVERYTHING
    assert worker.execute(held).succeeded
    assert due(worker.engine) == set()


def test_worker_with_older_code_leaves_the_new_assets_to_others(
    worker: RunWorker, older_code: CodeLocation, import_id: UUID, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """升级到一半：旧的工人做它有的，新的做其余的；旧的重起也不把图写回去。"""
    (folder := tmp_path / "older").mkdir()
    with warm_worker(older_code, worker.engine, worker.settings, folder, monkeypatch) as older:
        older.write_graph()
        held = claimed(older)
        assert held.assets == ("orders", "customers", "leads")
        assert older.execute(held).succeeded
        assert older.claim() is None
    assert due(worker.engine) == {"products"}
    rest = claimed(worker)
    assert rest.assets == ("products", "daily_report")
    assert worker.execute(rest).succeeded
    assert progress(worker, import_id) == (1, 1, 0)


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["died", "cancelled"])
def test_older_worker_that_buries_a_run_forgets_no_asset_that_its_code_does_not_have(
    worker: RunWorker,
    older_code: CodeLocation,
    import_id: UUID,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    is_cancelled: bool,
) -> None:
    """升级到一半：新的工人做新资产时死了，来收尾的是旧的。"""
    with monkeypatch.context() as broken:
        fail(broken, extra_assets, "_content", DatabaseUnavailableError("away"))
        worker.execute(claimed(worker))
    with worker.engine.begin() as connection:
        connection.execute(sa.update(ledger).values(retry_at=None))
    dead = claimed(worker)
    assert dead.assets == ("products", "daily_report")
    begin(worker, dead.run.run_id)
    if is_cancelled:
        worker.instance.report_run_canceling(dead.run)
    expire_leases(worker.engine)
    before = len(announced(worker.engine))
    reconcile_runs(replace(worker, location=older_code))
    products = entries(worker.engine)["products"]
    if is_cancelled:
        assert (products.failures, products.held_reason) == (0, f"run {dead.run.run_id} was cancelled")
    else:
        assert (products.failures, products.failed_run_id) == (1, dead.run.run_id)
        assert announced(worker.engine)[before:] == [("products", "failed", "pending")]
