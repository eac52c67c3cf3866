"""三个资产经 Dagster 物化：写出的表就是 DOMAIN 说的样子，账目的检查在事件日志里。"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetCheckSeverity,
    AssetKey,
    DagsterEventType,
    DagsterInstance,
    DagsterRunStatus,
    Failure,
)

from bridge.runs.worker import RunWorker
from bridge.warm_dagster.code_location import CodeLocation, RunResult
from bridge.warm_dagster.code_location_name import JOB_NAME
from bridge.warm_dagster.internals import create_execution_plan
from etl_assets.core.errors import EtlError
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.customers.asset import customers
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.leads.asset import leads
from etl_assets.ledger.failures import MAX_FAILURES
from etl_assets.orchestration import asset_runs
from etl_assets.orders.asset import orders
from etl_assets.testing.fixtures import MaterializeDays, ReadTable
from etl_assets.testing.raw_data import RawData

DAY = date(2026, 1, 5)
NEXT = date(2026, 1, 6)
AFTER = date(2026, 1, 7)
ORDERS = AssetKey("orders")
ACCOUNTING = AssetCheckKey(ORDERS, "accounting")
REJECTED_ROWS = AssetCheckKey(ORDERS, "rejected_rows")
WARNED_ROWS = AssetCheckKey(ORDERS, "warned_rows")

SWALLOW = """
    CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER swallow BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.order_id = 'lost') EXECUTE FUNCTION swallow();
"""


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, tzinfo=UTC)


def states(instance: DagsterInstance, check: AssetCheckKey) -> dict[str | None, str]:
    """网页显示的：分区 → 检查的状态；指着旧物化的不算。"""
    found = instance.event_log_storage.get_asset_check_partition_info([check])
    return {info.partition_key: info.latest_execution_status.value for info in found if info.is_current}


def evaluations(instance: DagsterInstance, run_id: str) -> dict[tuple[str, str | None], AssetCheckEvaluation]:
    """一个运行里（检查，分区）的结果，取自事件日志。"""
    found = {}
    for record in instance.get_records_for_run(run_id, of_type=DagsterEventType.ASSET_CHECK_EVALUATION).records:
        event = record.event_log_entry.get_dagster_event()
        evaluation = event.asset_check_evaluation_data
        found[evaluation.check_name, evaluation.partition] = evaluation
    return found


def values(metadata: Any) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items()}


def latest_run_id(instance: DagsterInstance) -> str:
    return instance.get_runs(limit=1)[0].run_id


# ---- 物化 ------------------------------------------------------------------------


def test_an_order_becomes_a_customer_and_a_won_lead(
    raw_data: RawData, materialize_days: MaterializeDays, read_table: ReadTable
) -> None:
    raw_data.add_import([{}])
    assert materialize_days([orders, customers, leads], DAY).success
    assert read_table("orders")["latest_status"].to_list() == ["completed"]
    customer = read_table("customers").row(0, named=True)
    assert customer["customer_global_id"] == "fa55f60f-e32c-5a53-a54e-925cf73a97da"
    assert (customer["order_count"], str(customer["total_amount"])) == (1, "120.50")
    lead = read_table("business_leads").row(0, named=True)
    assert lead["lead_id"] == "fd4ef8d1-2684-5631-8acd-3c839ea84862"
    assert (lead["current_stage"], lead["closed_by"]) == ("WON", "etl")
    assert lead["closed_at"] == datetime(2026, 1, 5, 4, 0, tzinfo=UTC)


def test_a_range_shows_each_day_its_own_figures(raw_data: RawData, materialize_days: MaterializeDays) -> None:
    raw_data.add_import(
        [
            {},
            {"order_id": "B", "order_type": "打样订单", "customer_name": "李四"},
            {"order_id": None},
            {"order_id": "C", "ordered_at": at(6)},
            {"order_id": None, "ordered_at": at(6)},
            {"quantity": -1, "ordered_at": at(6)},
        ]
    )
    events = materialize_days([orders, customers, leads], DAY, AFTER).get_asset_materialization_events()
    made = [event.step_materialization_data.materialization for event in events]
    found = {(one.asset_key.to_user_string(), one.partition): values(one.metadata) for one in made}
    of_orders = [found["orders", str(day)] for day in (DAY, NEXT, AFTER)]
    counted = (
        "rows",
        "rejected",
        "rejected/missing_order_id",
        "rejected/negative_quantity",
        "type/BULK",
        "type/SAMPLE",
    )
    assert [tuple(of_day.get(name) for name in counted) for of_day in of_orders] == [
        (2, 1, 1, None, 1, 1),
        (1, 2, 1, 1, 1, None),
        (0, 0, None, None, None, None),
    ]
    assert [len(of_day.get("preview", "").splitlines()) for of_day in of_orders] == [4, 3, 0]
    assert [found["customers", str(day)]["rows"] for day in (DAY, NEXT, AFTER)] == [2, 1, 0]
    assert [found["leads", str(day)]["rows"] for day in (DAY, NEXT, AFTER)] == [3, 2, 0]
    of_run = "2026-01-05..2026-01-07: 3 computed, 3 inserted, 0 updated, 0 deleted, 3 rejected in "
    assert all(of_day["whole_run"].startswith(of_run) for of_day in of_orders)
    plotted = {name for of_day in found.values() for name, value in of_day.items() if isinstance(value, int | float)}
    assert plotted.isdisjoint({"computed", "inserted", "updated", "deleted", "duration_seconds", "days"})


def test_rows_of_a_day_are_those_of_its_kinds_even_when_an_order_leaves_it(
    raw_data: RawData, materialize_days: MaterializeDays
) -> None:
    raw_data.add_import([{}, {"order_id": "B"}])
    materialize_days([orders], DAY)
    raw_data.add_import([{"order_id": "B", "ordered_at": at(6)}])
    (event,) = materialize_days([orders], DAY).get_asset_materialization_events()
    metadata = values(event.step_materialization_data.materialization.metadata)
    assert (metadata["rows"], metadata["type/BULK"], metadata["computed"]) == (1, 1, 2)


def test_day_outside_the_partitions_is_refused_before_anything_is_read(
    raw_data: RawData, materialize_days: MaterializeDays, read_table: ReadTable
) -> None:
    raw_data.add_import([{"ordered_at": datetime(1999, 12, 31, 4, tzinfo=UTC)}])
    with pytest.raises(Failure, match="1999-12-31 is outside the partitions 2000-01-01"):
        materialize_days([orders], date(1999, 12, 31))
    assert read_table("orders").is_empty()


def test_a_day_shows_a_preview_and_how_many_of_each_kind(raw_data: RawData, materialize_days: MaterializeDays) -> None:
    raw_data.add_import([{"customer_name": "竖|线\n换行"}, {"order_id": "B", "order_type": "打样订单"}])
    events = materialize_days([orders, customers, leads], DAY).get_asset_materialization_events()
    found = {
        event.asset_key.to_user_string(): values(event.step_materialization_data.materialization.metadata)
        for event in events
    }
    assert (found["orders"]["type/BULK"], found["orders"]["type/SAMPLE"]) == (1, 1)
    assert found["leads"]["stage/WON"] == 1
    lines = found["orders"]["preview"].splitlines()
    assert lines[0].startswith("| order_id | customer_nickname |")
    assert r"竖\x7c线 换行" in lines[2]
    assert len(lines) == 4
    assert "120.50" in found["customers"]["preview"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("张三-1", "张三-1"),
        ("![](http://x/y.png)", "` ![](http://x/y.png) `"),
        ("www.evil.example", "` www.evil.example `"),
        ("<img src=x>", "` <img src=x> `"),
        ("a|b\nc\\", r"` a\x7cb c\ `"),
        ("a\\|![](http://x)", r"` a\\x7c![](http://x) `"),
        ("``x`` \u202e", r"``` ``x`` \u202e ```"),
    ],
)
def test_preview_shows_text_of_buyers_as_text(
    raw_data: RawData, materialize_days: MaterializeDays, name: str, shown: str
) -> None:
    raw_data.add_import([{"customer_name": name}])
    (materialization,) = materialize_days([orders], date(2026, 1, 5)).asset_materializations_for_node("orders")
    assert f" {shown} |" in str(materialization.metadata["preview"].value)


def test_preview_counts_rows_of_no_kind_and_its_failure_is_not_the_step_s(
    raw_data: RawData, materialize_days: MaterializeDays, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    materialize_days([orders, customers, leads], DAY)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE business_leads SET current_stage = NULL, closed_by = 'user', closed_at = now()"
        )
    (event,) = materialize_days([leads], DAY).get_asset_materialization_events()
    assert values(event.step_materialization_data.materialization.metadata)["stage/none"] == 1

    def refuse(*_: object) -> None:
        raise EtlError("no")

    monkeypatch.setattr(asset_runs, "read_previews", refuse)
    (event,) = materialize_days([leads], DAY).get_asset_materialization_events()
    assert "preview" not in event.step_materialization_data.materialization.metadata


# ---- 账目的检查 ------------------------------------------------------------------


def test_account_of_a_day_is_a_check_of_its_partition(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance
) -> None:
    raw_data.add_import([{}], completed_at=None)
    raw_data.add_import([{}, {"order_id": "B"}])
    run_id = materialize_days([orders], DAY).run_id
    found = evaluations(dagster_instance, run_id)
    assert set(found) == {("accounting", "2026-01-05"), ("rejected_rows", "2026-01-05"), ("warned_rows", "2026-01-05")}
    assert all(evaluation.passed for evaluation in found.values())
    account = found["accounting", "2026-01-05"]
    assert (account.blocking, account.severity) == (True, AssetCheckSeverity.ERROR)
    assert values(account.metadata) == {"raw": 3, "loaded": 2, "superseded": 1, "rejected": 0, "difference": 0}
    assert states(dagster_instance, ACCOUNTING) == {"2026-01-05": "SUCCEEDED"}


def test_every_day_of_a_range_has_its_own_result(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance
) -> None:
    raw_data.add_import([{}, {"order_id": None, "ordered_at": at(6)}])
    for _ in range(2):  # 再做一次，结果指着新的物化
        assert materialize_days([orders, customers, leads], DAY, AFTER).success
        assert states(dagster_instance, ACCOUNTING) == dict.fromkeys(
            ["2026-01-05", "2026-01-06", "2026-01-07"], "SUCCEEDED"
        )
        assert states(dagster_instance, REJECTED_ROWS) == {
            "2026-01-05": "SUCCEEDED",
            "2026-01-06": "FAILED",
            "2026-01-07": "SUCCEEDED",
        }


def test_rejected_rows_are_a_warning_with_rules_and_examples(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance, read_table: ReadTable
) -> None:
    raw_data.add_import([{}, {"order_id": None}, {"order_id": " "}, {"quantity": -1}])
    assert materialize_days([orders, customers, leads], DAY).success
    warning = evaluations(dagster_instance, latest_run_id(dagster_instance))["rejected_rows", "2026-01-05"]
    assert (warning.passed, warning.severity, warning.blocking) == (False, AssetCheckSeverity.WARN, False)
    assert warning.description == "3 rejected; see them with `etl show rejected --day 2026-01-05`"
    assert values(warning.metadata) == {
        "missing_order_id": 2,
        "negative_quantity": 1,
        "raw_ids": {"missing_order_id": [2, 3], "negative_quantity": [4]},
    }
    assert read_table("business_leads").height == 1


def test_repaired_row_clears_the_warning(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance
) -> None:
    bad = raw_data.add_import([{"quantity": -1}])
    materialize_days([orders], DAY)
    assert states(dagster_instance, REJECTED_ROWS) == {"2026-01-05": "FAILED"}
    raw_data.set_status(bad, "failed")
    raw_data.add_import([{}])
    materialize_days([orders], DAY)
    assert states(dagster_instance, REJECTED_ROWS) == {"2026-01-05": "SUCCEEDED"}


def test_repeated_rows_and_unmapped_types_are_a_warning_with_counts_and_examples(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance, read_table: ReadTable
) -> None:
    items: list[dict[str, Any]] = [
        {},
        {"order_id": " A-1"},
        {"order_id": "B", "order_type": " 定制"},
        {},
        {"quantity": -1},
    ]
    raw_data.add_import(
        [*items, {"order_id": "C", "order_type": "改衣", "ordered_at": at(6)}, {"order_id": "D", "order_type": None}]
    )
    raw_data.map_type("配件", "别的")
    raw_data.add_import([{"order_id": "E", "order_type": "配件"}])
    assert materialize_days([orders, customers, leads], DAY, NEXT).success
    found = evaluations(dagster_instance, latest_run_id(dagster_instance))
    warning = found["warned_rows", "2026-01-05"]
    assert (warning.passed, warning.severity, warning.blocking) == (False, AssetCheckSeverity.WARN, False)
    assert warning.description == (
        "2 valid rows lost to a later row of the same order in the same import (one row per item? group them when importing); "
        "1 orders count as BULK because order_type_mappings does not know their type"
    )
    assert values(warning.metadata) == {
        "repeated_in_import": 2,
        "unmapped_type": 1,
        "raw_ids": {"repeated_in_import": [1, 2], "unmapped_type": [3]},
        "unmapped_types": {"定制": 1},
    }
    assert values(found["warned_rows", "2026-01-06"].metadata) == {
        "unmapped_type": 1,
        "raw_ids": {"unmapped_type": [6]},
        "unmapped_types": {"改衣": 1},
    }
    assert found["accounting", "2026-01-05"].passed
    assert read_table("business_leads").height == 5


def test_warning_goes_when_its_cause_is_mended(
    raw_data: RawData, materialize_days: MaterializeDays, dagster_instance: DagsterInstance
) -> None:
    ungrouped = raw_data.add_import([{"order_type": "定制"}, {"order_type": "定制"}])
    materialize_days([orders], DAY)
    assert states(dagster_instance, WARNED_ROWS) == {"2026-01-05": "FAILED"}
    raw_data.set_status(ungrouped, "failed")
    raw_data.add_import([{"order_type": "定制"}])
    raw_data.map_type("定制", "BULK")
    materialize_days([orders], DAY)
    assert states(dagster_instance, WARNED_ROWS) == {"2026-01-05": "SUCCEEDED"}


def test_lost_row_fails_the_check_of_its_day_and_nothing_follows(
    raw_data: RawData,
    materialize_days: MaterializeDays,
    dagster_instance: DagsterInstance,
    read_table: ReadTable,
    engine: sa.Engine,
) -> None:
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6)}])
    materialize_days([orders, customers, leads], DAY, AFTER)
    before = [read_table(name) for name in ("orders", "customers", "business_leads")]
    raw_data.add_import([{"order_id": "lost", "ordered_at": at(6)}])
    with engine.begin() as connection:
        connection.exec_driver_sql(SWALLOW)
    with pytest.raises(Failure, match="on 2026-01-06, 1 loaded"):
        materialize_days([orders, customers, leads], DAY, AFTER)
    run_id = latest_run_id(dagster_instance)
    found = evaluations(dagster_instance, run_id)
    assert set(found) == {("accounting", "2026-01-06")}
    failed = found["accounting", "2026-01-06"]
    assert (failed.passed, failed.blocking, failed.severity) == (False, True, AssetCheckSeverity.ERROR)
    expected = {"raw": 2, "loaded": 1, "superseded": 0, "rejected": 0, "difference": 1, "lost_raw_ids": [3]}
    assert values(failed.metadata) == expected
    assert states(dagster_instance, ACCOUNTING)["2026-01-06"] == "FAILED"
    steps = {
        (stats.step_key, stats.status.value) for stats in dagster_instance.get_run_step_stats(run_id) if stats.status
    }
    assert steps == {("orders", "FAILURE")}
    assert all(
        read_table(name).equals(table)
        for name, table in zip(("orders", "customers", "business_leads"), before, strict=True)
    )


# ---- 热的一路 --------------------------------------------------------------------


@pytest.fixture
def run_due(
    worker: RunWorker, engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> Callable[..., tuple[str, RunResult]]:
    """导入这些行，领取到期的日子并执行。"""

    def run(*rows: dict[str, Any]) -> tuple[str, RunResult]:
        request_imports(engine, etl_settings, [ImportEvent(raw_data.add_import(rows), uuid4())])
        claim = worker.claim()
        assert claim is not None
        return claim.lease.run_id, worker.execute(worker.start(claim))

    return run


def test_run_of_a_worker_reports_every_check(worker: RunWorker, run_due: Callable[..., tuple[str, RunResult]]) -> None:
    run_id, result = run_due({}, {"order_id": None, "ordered_at": at(6)})
    assert result.succeeded
    assert {key: evaluation.passed for key, evaluation in evaluations(worker.instance, run_id).items()} == {
        ("accounting", "2026-01-05"): True,
        ("accounting", "2026-01-06"): True,
        ("rejected_rows", "2026-01-05"): True,
        ("rejected_rows", "2026-01-06"): False,
        ("warned_rows", "2026-01-05"): True,
        ("warned_rows", "2026-01-06"): True,
    }
    assert states(worker.instance, REJECTED_ROWS) == {"2026-01-05": "SUCCEEDED", "2026-01-06": "FAILED"}


def test_worker_that_finds_a_lost_row_leaves_its_day_due_and_says_why(
    worker: RunWorker, run_due: Callable[..., tuple[str, RunResult]], engine: sa.Engine, read_table: ReadTable
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(SWALLOW)
    run_id, result = run_due({"order_id": "lost"})
    assert [(failure.asset, failure.kind) for failure in result.failures] == [("orders", "unknown")]
    assert "1 raw rows in scope on 2026-01-05, 0 loaded + 0 superseded + 0 rejected (look at raw_id 1)" in result.error
    run = worker.instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status is DagsterRunStatus.FAILURE
    assert states(worker.instance, ACCOUNTING) == {"2026-01-05": "FAILED"}
    entries = sa.select(
        ledger.c.asset, ledger.c.requested > ledger.c.materialized, ledger.c.retry_at.is_not(None)
    ).order_by(ledger.c.asset)
    with engine.begin() as connection:
        assert [tuple(row) for row in connection.execute(entries)] == [
            ("customers", False, False),
            ("leads", False, False),
            ("orders", True, True),
        ]
        connection.exec_driver_sql("DROP FUNCTION swallow() CASCADE; UPDATE etl.ledger SET retry_at = NULL")
    claim = worker.claim()
    assert claim is not None
    assert worker.execute(worker.start(claim)).succeeded
    assert states(worker.instance, ACCOUNTING) == {"2026-01-05": "SUCCEEDED"}
    assert read_table("business_leads").height == 1


def test_day_with_a_lost_row_is_held_after_some_attempts(
    worker: RunWorker, run_due: Callable[..., tuple[str, RunResult]], engine: sa.Engine
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(SWALLOW)
    run_due({"order_id": "lost"})
    with engine.begin() as connection:
        connection.execute(
            sa.update(ledger).where(ledger.c.asset == "orders").values(retry_at=None, failures=MAX_FAILURES - 1)
        )
    claim = worker.claim()
    assert claim is not None
    worker.execute(worker.start(claim))
    with engine.connect() as connection:
        held = connection.scalars(sa.select(ledger.c.held_reason).where(ledger.c.asset == "orders")).one()
    assert "the rows do not add up, so nothing was written" in held
    assert worker.claim() is None


def test_click_on_an_asset_executes_its_checks(worker: RunWorker, location: CodeLocation, raw_data: RawData) -> None:
    """网页点名资产与它的检查；点名了的子集也只算一次。"""
    raw_data.add_import([{}])
    checks = frozenset({ACCOUNTING, REJECTED_ROWS, WARNED_ROWS})
    job = location.job(JOB_NAME, frozenset({ORDERS}), checks)
    assert location.job(JOB_NAME, frozenset({ORDERS}), checks) is job
    plan = create_execution_plan(job)  # 缺省的计划是资产的全部检查
    tags = {"dagster/partition": "2026-01-05"}
    clicked = worker.instance.create_run_for_job(
        job, execution_plan=plan, tags=tags, asset_selection=frozenset({ORDERS})
    )
    run = clicked._replace(asset_check_selection=checks)
    assert location.execute_run(worker.instance, run).succeeded
    assert set(evaluations(worker.instance, run.run_id)) == {(check.name, "2026-01-05") for check in checks}
