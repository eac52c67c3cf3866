"""网页来的运行走同一条热的路：启动、重新执行、取消、回填；每一种都真的做一遍。"""

from __future__ import annotations

import asyncio
import time
from datetime import date, timedelta
from typing import Any

import nats
import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.stack.addresses import StackAddresses
from etl_assets.core.etl_tables import leases, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.ledger.requests import request_days
from tests.acceptance.conftest import AddOrders, Query, held_day
from tests.acceptance.dagster_ui import ASSETS, DagsterUi

DAY = date(1999, 5, 3)


@pytest.fixture(scope="module")
def ui(query: Query) -> DagsterUi:
    return DagsterUi(query)


@pytest.fixture(scope="module", autouse=True)
def backfill_id(ui: DagsterUi) -> str:
    """一开头就发起，最后才看：Dagster 的回填守护进程半分钟才看一眼。"""
    return ui.backfill([f"1999-{month:02}-{day:02}" for month in (7, 8) for day in range(1, 31)])


def started_waiting(ui: DagsterUi, engine: sa.Engine, run_id: str) -> None:
    """等到它在等锁。"""
    ui.wait(run_id, "STARTED")
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'etl'"
    )
    deadline = time.monotonic() + 30
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---- 启动 ------------------------------------------------------------------------


def test_click_runs_warm_and_writes_all_three_tables(
    ui: DagsterUi, add_orders: AddOrders, stack_engine: sa.Engine, stack_settings: EtlSettings
) -> None:
    add_orders(DAY, *[f"UI-{number}" for number in range(5)])
    run_id = ui.launch(day=DAY.isoformat())
    run = ui.wait(run_id)
    assert run["status"] == "SUCCESS", ui.messages(run_id)
    assert run["tags"]["dagster/dayline/lane"] == "interactive"
    made = {(made["assetKey"]["path"][0], made["partition"]) for made in run["assetMaterializations"]}
    assert made == {(asset, DAY.isoformat()) for asset in ASSETS}
    orders = target_tables("public").orders
    with stack_engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(orders.c.order_date == DAY)) == 5
        assert connection.scalar(sa.select(sa.func.count()).where(leases.c.run_id == run_id)) == 0
    assert find_differences(stack_engine, stack_settings) == []


def test_range_of_days_is_one_run(ui: DagsterUi, stack_engine: sa.Engine) -> None:
    run_id = ui.launch(["orders"], day="1999-06-01", last_day="1999-06-30")
    assert ui.wait(run_id)["status"] == "SUCCESS", ui.messages(run_id)
    planned = sa.text(
        "SELECT count(*) > 30, count(DISTINCT xmin::text) FROM dagster.event_logs"
        " WHERE run_id = :run_id AND dagster_event_type LIKE '%PLANNED'"
    )
    with stack_engine.connect() as connection:
        assert tuple(connection.execute(planned, {"run_id": run_id}).one()) == (
            True,
            1,
        )  # 网页把计划的一起写，点击的人少等十几次提交


def test_job_is_launched_from_its_own_page(ui: DagsterUi) -> None:
    run_id = ui.launch(day="1999-06-02", job="etl")
    assert ui.wait(run_id)["status"] == "SUCCESS", ui.messages(run_id)


def test_click_does_not_wait_behind_a_backfill_of_a_thousand_days(ui: DagsterUi, stack_engine: sa.Engine) -> None:
    """三十四个回填的运行在排队，第一个卡在锁上：点击照样做完，它们还在排队。"""
    first = date(2001, 1, 1)
    starts = [first + timedelta(days=30 * number) for number in range(34)]
    with held_day(stack_engine, first):
        bulk = [
            ui.launch(
                ["orders"], day=f"{start}", last_day=f"{start + timedelta(days=29)}", **{"dagster/dayline/lane": "bulk"}
            )
            for start in starts
        ]
        ui.wait(bulk[0], "STARTED")
        assert ui.wait(ui.launch(day="1999-05-20"))["status"] == "SUCCESS"
        assert {ui.run(run_id)["status"] for run_id in bulk[1:]} == {"QUEUED"}
        for run_id in bulk[1:]:
            ui.terminate(run_id)
    assert ui.wait(bulk[0])["status"] == "SUCCESS"


# ---- 重新执行 ----------------------------------------------------------------------


def test_finished_run_is_run_again_from_its_page(ui: DagsterUi) -> None:
    first = ui.launch(day="1999-05-04")
    ui.wait(first)
    again = ui.reexecute(first, "ALL_STEPS")
    run = ui.wait(again)
    assert (run["status"], run["parentRunId"], run["rootRunId"]) == ("SUCCESS", first, first)
    assert run["tags"]["dagster/partition"] == "1999-05-04"
    assert {made["assetKey"]["path"][0] for made in run["assetMaterializations"]} == set(ASSETS)


def test_run_of_an_event_is_run_again_from_its_page(ui: DagsterUi, query: Query, stack_engine: sa.Engine) -> None:
    day = date(1999, 5, 5)
    with stack_engine.begin() as connection:
        request_days(connection, "public", [day])
    newest = 'query { runsOrError(filter: {tags: [{key: "dagster/partition", value: "1999-05-05"}]}) { ... on Runs { results { runId } } } }'
    deadline = time.monotonic() + 60
    while not (found := query(newest)["runsOrError"]["results"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first = found[-1]["runId"]
    assert ui.wait(first)["tags"]["dagster/dayline/trigger"] == "event"
    run = ui.wait(ui.reexecute(first, "ALL_STEPS"))
    assert (run["status"], run["parentRunId"]) == ("SUCCESS", first)
    assert (run["tags"]["dagster/dayline/lane"], run["tags"]["dagster/dayline/trigger"]) == ("interactive", "person")
    one = ui.wait(ui.launch(["customers"], day="1999-05-05"))
    assert (one["status"], [made["assetKey"]["path"] for made in one["assetMaterializations"]]) == (
        "SUCCESS",
        [["customers"]],
    )


def finished_backfill(query: Query, backfill_id: str) -> dict[str, Any]:
    runs_of = "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status runs { runId } } } }"
    deadline = time.monotonic() + 120
    while (found := query(runs_of, id=backfill_id)["partitionBackfillOrError"])["status"] != "COMPLETED_SUCCESS":
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def test_failed_run_goes_on_from_its_failure(
    ui: DagsterUi, query: Query, backfill_id: str, stack_engine: sa.Engine
) -> None:
    finished_backfill(query, backfill_id)  # 它的运行也会撞上不见了的表
    with stack_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE customers RENAME TO customers_away")
    try:
        failed = ui.launch(day="1999-05-06")
        assert ui.wait(failed)["status"] == "FAILURE"
        assert any("the tables differ from the contract" in message for message in ui.messages(failed))
    finally:
        with stack_engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE customers_away RENAME TO customers")
    run = ui.wait(ui.reexecute(failed, "FROM_FAILURE"))
    assert run["status"] == "SUCCESS", ui.messages(run["runId"])
    assert {made["assetKey"]["path"][0] for made in run["assetMaterializations"]} >= {"customers", "leads"}


# ---- 取消 ------------------------------------------------------------------------


def test_running_run_is_cancelled_and_leaves_nothing_half_written(
    ui: DagsterUi, add_orders: AddOrders, stack_engine: sa.Engine
) -> None:
    day = date(1999, 5, 10)
    orders = target_tables("public").orders
    add_orders(day, "C-1")
    with held_day(stack_engine, day):
        run_id = ui.launch(day=day.isoformat())
        started_waiting(ui, stack_engine, run_id)
        deadline = time.monotonic() + 10
        while not any('Started execution of step "orders"' in message for message in ui.messages(run_id)):
            assert time.monotonic() < deadline, "the page does not show the step that is running"
            time.sleep(0.05)
        ui.terminate(run_id)
        run = ui.wait(run_id, timeout_seconds=20)
    assert run["status"] == "CANCELED", ui.messages(run_id)
    lease = sa.select(sa.func.count()).where(leases.c.run_id == run_id)
    deadline = time.monotonic() + 20
    with stack_engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(orders.c.order_date == day)) == 0
        while connection.scalar(lease):  # 先有结局，再放租约
            assert time.monotonic() < deadline, "the cancelled run keeps its lease"
            time.sleep(0.05)
    assert ui.wait(ui.launch(day=day.isoformat()))["status"] == "SUCCESS"


def test_queued_run_is_cancelled_at_once(ui: DagsterUi, stack_engine: sa.Engine) -> None:
    """两个工人都忙着：第三个运行在队列里等，取消它立刻生效，以后也不会执行。"""
    days = [date(1999, 5, 11), date(1999, 5, 12)]
    with held_day(stack_engine, days[0]), held_day(stack_engine, days[1]):
        busy = [ui.launch(["orders"], day=day.isoformat()) for day in days]
        for run_id in busy:
            started_waiting(ui, stack_engine, run_id)
        queued = ui.launch(["orders"], day="1999-05-13")
        time.sleep(0.3)
        assert ui.run(queued)["status"] == "QUEUED"
        ui.terminate(queued)
        assert ui.run(queued)["status"] == "CANCELED"
    for run_id in busy:
        assert ui.wait(run_id)["status"] == "SUCCESS"
    time.sleep(1)
    assert ui.run(queued)["assetMaterializations"] == []


def test_days_of_a_cancelled_run_are_held_until_something_new_asks_for_them(
    ui: DagsterUi, stack_engine: sa.Engine
) -> None:
    day = date(1999, 5, 14)
    due = sa.select(ledger.c.held_reason).where(ledger.c.day == day, ledger.c.asset == "orders")
    with held_day(stack_engine, day):
        run_id = ui.launch(day=day.isoformat())
        started_waiting(ui, stack_engine, run_id)
        with stack_engine.begin() as connection:
            request_days(connection, "public", [day])
        ui.terminate(run_id)
        assert ui.wait(run_id)["status"] == "CANCELED"
    time.sleep(1)
    with stack_engine.connect() as connection:
        assert connection.scalar(due) == f"run {run_id} was cancelled"


# ---- 坏的输入 ----------------------------------------------------------------------


def test_partition_outside_the_range_fails_with_a_sentence(ui: DagsterUi) -> None:
    run = ui.wait(ui.launch(["orders"], day="1990-01-01"))
    assert run["status"] == "FAILURE"
    assert any("1990-01-01 is outside the partitions" in message for message in ui.messages(run["runId"]))


def test_queued_run_whose_message_is_lost_is_found_by_the_workers(
    ui: DagsterUi, stack: StackAddresses, stack_engine: sa.Engine
) -> None:
    """NATS 的存储没了：工人自己发现没人做的 QUEUED 运行。"""
    days = [date(1999, 5, 15), date(1999, 5, 16)]
    with held_day(stack_engine, days[0]), held_day(stack_engine, days[1]):
        busy = [ui.launch(["orders"], day=day.isoformat()) for day in days]
        for run_id in busy:
            started_waiting(ui, stack_engine, run_id)
        queued = ui.launch(["orders"], day="1999-05-17")
        asyncio.run(purge_tasks(stack))
    for run_id in [*busy, queued]:
        assert ui.wait(run_id)["status"] == "SUCCESS"


async def purge_tasks(stack: StackAddresses) -> None:
    client = await nats.connect(stack.nats_url)
    await client.jetstream().purge_stream("TASKS")
    await client.close()


# ---- 回填 ------------------------------------------------------------------------


def test_backfill_goes_to_the_last_lane_in_runs_of_thirty_days(ui: DagsterUi, query: Query, backfill_id: str) -> None:
    found = finished_backfill(query, backfill_id)
    runs = [ui.run(run["runId"]) for run in found["runs"]]
    assert {run["tags"]["dagster/dayline/lane"] for run in runs} == {"bulk"}
    assert len(runs) == 2  # 7 月 31 日不在其中，断成两段
    assert all(run["status"] == "SUCCESS" for run in runs)
