"""取消与 kill -9 的风暴：随便什么时候来，没有卡住的运行，没有写了一半的日子，最后三张表等于参照。

平日跑一小段，`pdm run test-deep` 跑全长。种子印在失败信息里。
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import date, timedelta

import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.run_reconciler import MAX_RETRIES
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import leases, ledger, target_tables
from etl_assets.services.ledger import request_days
from tests.acceptance.conftest import AddOrders, Query, held_day
from tests.acceptance.dagster_ui import ASSETS, FINAL, DagsterUi

FIRST = date(1999, 1, 1)
DAYS = [FIRST + timedelta(days=offset) for offset in range(20)]
ORDERS_PER_DAY = 30


@pytest.fixture
def is_deep(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--hypothesis-profile") == "deep"


@pytest.fixture
def ui(query: Query) -> DagsterUi:
    return DagsterUi(query)


def versions_of(engine: sa.Engine, day: date) -> set[str]:
    """这一天的订单的金额；整天来自同一次导入，就只有一个值。"""
    orders = target_tables("public").orders.c
    with engine.connect() as connection:
        return set(map(str, connection.scalars(sa.select(orders.amount).where(orders.order_date == day))))


def eventually(condition: Callable[[], bool], *, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)


@pytest.mark.timeout(1_800)
def test_cancels_at_random_times_leave_no_stuck_run_and_no_half_written_day(
    ui: DagsterUi, add_orders: AddOrders, stack_engine: sa.Engine, stack_settings: EtlSettings, is_deep: bool
) -> None:
    seed = time.time_ns()
    chance = random.Random(seed)  # noqa: S311  # 不关安全
    cancels = 200 if is_deep else 20
    run_ids = []
    for number in range(cancels):
        day = chance.choice(DAYS)
        add_orders(day, *[f"S-{day:%d}-{order}" for order in range(ORDERS_PER_DAY)], amount=number + 1)
        with held_day(stack_engine, day) if chance.random() < 0.7 else nullcontext():  # 多数运行卡在锁上，取消得着
            run_id = ui.launch(day=day.isoformat())
            time.sleep(chance.uniform(0, 0.5))
            with suppress(AssertionError):  # 已经做完了的没有可取消的
                ui.terminate(run_id)
            time.sleep(chance.uniform(0, 0.5))
        run_ids.append(run_id)
        if chance.random() < 0.7:
            assert ui.wait(run_id, timeout_seconds=30)["status"] in FINAL, f"seed {seed}"
            assert len(versions_of(stack_engine, day)) <= 1, f"seed {seed}: {day} is half-written"
    statuses = [ui.wait(run_id, timeout_seconds=60)["status"] for run_id in run_ids]
    assert statuses.count("CANCELED") > cancels / 4, f"seed {seed}: {statuses}"
    assert set(statuses) <= {"CANCELED", "SUCCESS"}, f"seed {seed}"
    with stack_engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(leases.c.run_id.in_(run_ids))) == 0
    last = ui.wait(ui.launch(day=DAYS[0].isoformat(), last_day=DAYS[-1].isoformat()))
    assert last["status"] == "SUCCESS"
    assert find_differences(stack_engine, stack_settings) == [], f"seed {seed}"


@pytest.mark.timeout(1_800)
def test_killed_workers_lose_nothing(
    ui: DagsterUi, add_orders: AddOrders, query: Query, stack_engine: sa.Engine, stack_settings: EtlSettings, is_deep: bool
) -> None:
    seed = time.time_ns()
    chance = random.Random(seed)  # noqa: S311  # 不关安全
    kills = 100 if is_deep else 5
    clicked: list[str] = []
    for number in range(kills):
        days = chance.sample(DAYS, 3)
        for day in days:
            add_orders(day, *[f"K-{day:%d}-{order}" for order in range(ORDERS_PER_DAY)], amount=number + 1)
        if chance.random() < 0.5:
            clicked.append(ui.launch(day=days[0].isoformat()))
        with stack_engine.begin() as connection:
            request_days(connection, "public", days)
        assert kill_a_busy_worker(stack_engine, chance), f"seed {seed}: nobody works"

    def drained() -> bool:
        due = sa.select(sa.func.count()).where(ledger.c.day.in_(DAYS), ledger.c.requested > ledger.c.materialized)
        with stack_engine.connect() as connection:
            return connection.scalar(due) == 0 and connection.scalar(sa.select(sa.func.count()).select_from(leases)) == 0

    eventually(drained, timeout_seconds=120)
    unfinished = "query { runsOrError(filter: {statuses: [QUEUED, STARTING, STARTED, CANCELING]}) { ... on Runs { results { runId } } } }"
    eventually(lambda: query(unfinished)["runsOrError"]["results"] == [], timeout_seconds=60)
    assert find_differences(stack_engine, stack_settings) == [], f"seed {seed}"
    for run_id in clicked:
        made, runs = made_in_the_end(ui, query, run_id)
        assert made == set(ASSETS) or runs == 1 + MAX_RETRIES, f"seed {seed}: {run_id} made {made} in {runs} runs"


def kill_a_busy_worker(engine: sa.Engine, chance: random.Random) -> bool:
    """等到有人在做，再等一会儿，杀掉他；他是本机上这个栈的子进程。"""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            owners = connection.scalars(sa.select(leases.c.owner).where(leases.c.expires_at > sa.func.clock_timestamp())).all()
        if not owners:
            time.sleep(0.01)
            continue
        time.sleep(chance.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.kill(int(chance.choice(owners).rpartition(":")[2]), signal.SIGKILL)
            return True
    return False


def made_in_the_end(ui: DagsterUi, query: Query, run_id: str) -> tuple[set[str], int]:
    """这个运行与接着它的那些做好的资产，以及它们共有几个；死在最后一刻的运行没有什么要重来。"""
    children = """query($tag: String!) { runsOrError(filter: {tags: [{key: "dagster/parent_run_id", value: $tag}]}) {
        ... on Runs { results { runId } } } }"""
    run = ui.wait(run_id)
    made, runs = {made["assetKey"]["path"][0] for made in run["assetMaterializations"]}, 1
    for child in query(children, tag=run_id)["runsOrError"]["results"]:
        more, further = made_in_the_end(ui, query, child["runId"])
        made, runs = made | more, runs + further
    return made, runs
