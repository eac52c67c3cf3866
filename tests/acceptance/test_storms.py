"""取消与 kill -9 的风暴：随便什么时候来，没有卡住的运行，没有写了一半的日子，最后三张表等于参照。还有一个工人长久地干下去。

平日跑一小段，`pdm run test-deep` 跑全长。种子印在失败信息里。
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.runs.run_reconciler import MAX_RETRIES
from bridge.warm_dagster import lean_storage
from etl_assets.core.etl_tables import leases, ledger
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, target_tables
from etl_assets.ledger.requests import request_days
from tests.acceptance.conftest import AddOrders, Query, held_day
from tests.acceptance.dagster_ui import ASSETS, FINAL, DagsterUi

logger = get_logger(__name__)

FIRST = date(1999, 1, 1)
DAYS = [FIRST + timedelta(days=offset) for offset in range(20)]
ORDERS_PER_DAY = 30
LONGEST_BATCH = 250  # 到期十分钟还没做的日子，传感器会再要一次


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
    cancels = 200 if is_deep else 12
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
    ui: DagsterUi,
    add_orders: AddOrders,
    query: Query,
    stack_engine: sa.Engine,
    stack_settings: EtlSettings,
    is_deep: bool,
) -> None:
    seed = time.time_ns()
    chance = random.Random(seed)  # noqa: S311  # 不关安全
    wanted, kills = 100 if is_deep else 3, 0
    clicked: list[str] = []
    for number in range(3 * wanted):
        if kills == wanted:
            break
        days = chance.sample(DAYS, 3)
        for day in days:
            add_orders(day, *[f"K-{day:%d}-{order}" for order in range(ORDERS_PER_DAY)], amount=number + 1)
        if chance.random() < 0.5:
            clicked.append(ui.launch(day=days[0].isoformat()))
        with stack_engine.begin() as connection:
            request_days(connection, "public", days)
        kills += kill_a_busy_worker(stack_engine, chance)
    assert kills == wanted, f"seed {seed}: too few workers died in mid-run"

    def drained() -> bool:
        due = sa.select(sa.func.count()).where(ledger.c.day.in_(DAYS), ledger.c.requested > ledger.c.materialized)
        with stack_engine.connect() as connection:
            return (
                connection.scalar(due) == 0 and connection.scalar(sa.select(sa.func.count()).select_from(leases)) == 0
            )

    eventually(drained, timeout_seconds=120)
    unfinished = "query { runsOrError(filter: {statuses: [QUEUED, STARTING, STARTED, CANCELING]}) { ... on Runs { results { runId } } } }"
    eventually(lambda: query(unfinished)["runsOrError"]["results"] == [], timeout_seconds=60)
    assert find_differences(stack_engine, stack_settings) == [], f"seed {seed}"
    for run_id in clicked:
        made, runs = made_in_the_end(ui, query, run_id)
        assert made == set(ASSETS) or runs == 1 + MAX_RETRIES, f"seed {seed}: {run_id} made {made} in {runs} runs"


def kill_a_busy_worker(engine: sa.Engine, chance: random.Random) -> bool:
    """等到有人在做，再等一会儿，杀掉他；他死时手里还有运行才算数。他是本机上这个栈的子进程。"""
    deadline = time.monotonic() + 60
    while not (busy := [process for process in owners_of_runs(engine) if is_alive(process)]):  # 死了的，租约还在
        assert time.monotonic() < deadline, "nobody works"
        time.sleep(0.005)
    victim = chance.choice(busy)
    time.sleep(chance.uniform(0, 0.1))
    with suppress(ProcessLookupError):  # 刚杀过的，看护者还没收尸
        os.kill(victim, signal.SIGKILL)
        return victim in owners_of_runs(engine)
    return False


def owners_of_runs(engine: sa.Engine) -> list[int]:
    """租约还没到期的工人的进程号。"""
    with engine.connect() as connection:
        owners = connection.scalars(
            sa.select(leases.c.owner).where(leases.c.expires_at > sa.func.clock_timestamp())
        ).all()
    return [int(owner.rpartition(":")[2]) for owner in owners]


def is_alive(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
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


# ---- 长久地干下去 --------------------------------------------------------------------


@pytest.mark.timeout(4 * 3_600)
def test_memory_and_connections_of_a_worker_do_not_grow_with_its_runs(
    shop: str, stack_engine: sa.Engine, stack_settings: EtlSettings, is_deep: bool
) -> None:
    """一天一个运行，三个资产都做；先做百分之五，好让缓存长到它们的样子。连接不多于两个池留着的。

    两个工人里只有一个做事件的运行。短的那一遍只看个大概：内存那时还在热身。
    """
    runs = 10_000 if is_deep else 60
    days = days_apart(runs)
    done_before = succeeded_runs(stack_engine)
    add_daily_orders(stack_engine, shop, set(days))

    workers = work_off(stack_engine, days[: runs // 20])
    (worker,) = workers
    memory = resident_bytes(worker)
    assert work_off(stack_engine, days[runs // 20 :]) == workers, "the worker was replaced"

    growth, connections = resident_bytes(worker) / memory - 1, connections_of(stack_engine, worker)
    logger.info(
        "worker after its runs",
        runs=runs,
        memory_mib=memory >> 20,
        growth=f"{growth:+.1%}",
        connections=dict(connections),
    )
    assert succeeded_runs(stack_engine) - done_before == runs
    assert growth < (0.1 if is_deep else 0.5)
    assert 0 < connections["etl"] <= stack_settings.pool_size
    assert connections.total() <= stack_settings.pool_size + lean_storage._POOL_SIZE
    assert find_differences(stack_engine, stack_settings) == []


def days_apart(count: int) -> list[date]:
    """不相邻的日子，领取时合不成一段：一天一个运行。用完了从头再来。"""
    return [date(2000, 1, 1) + timedelta(days=2 * (number % 4_800)) for number in range(count)]


def add_daily_orders(engine: sa.Engine, shop: str, days: Iterable[date]) -> None:
    """每天三个订单，客户各不相同：一个运行的活儿不随日子多起来。"""
    import_id = uuid4()
    row = {"import_id": import_id, "shop": shop, "amount": 1}
    rows = [
        row
        | {
            "order_id": f"L-{day}-{number}",
            "customer_name": f"{day}-{number}",
            "ordered_at": datetime.combine(day, clock(4), UTC),
        }
        for day in days
        for number in range(3)
    ]
    with engine.begin() as connection:
        connection.execute(
            sa.insert(import_tasks).values(import_id=import_id, status="completed", completed_at=datetime.now(UTC))
        )
        connection.execute(sa.insert(raw_orders), rows)


def work_off(engine: sa.Engine, days: Sequence[date]) -> set[int]:
    """一批一批地要求做这些天，等到做完；返回做它们的工人的进程号。"""
    owners: set[str] = set()

    def drained() -> bool:
        due = sa.select(sa.func.count()).where(
            ledger.c.requested > ledger.c.materialized, ledger.c.held_reason.is_(None)
        )
        with engine.connect() as connection:
            owners.update(connection.scalars(sa.select(leases.c.owner)))
            return connection.scalar(due) == 0 and not connection.scalar(sa.select(sa.func.count()).select_from(leases))

    for start in range(0, len(days), LONGEST_BATCH):
        batch = days[start : start + LONGEST_BATCH]
        with engine.begin() as connection:
            request_days(connection, "public", batch)
        eventually(drained, timeout_seconds=60 + 2 * len(batch))
    return {int(owner.rpartition(":")[2]) for owner in owners}


def succeeded_runs(engine: sa.Engine) -> int:
    """事件要的、成功了的运行；定时的不算。"""
    text = """SELECT count(*) FROM dagster.runs JOIN dagster.run_tags USING (run_id)
        WHERE status = 'SUCCESS' AND key = 'dagster/dayline/trigger' AND value = 'event'"""
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(text).scalar_one())


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def connections_of(engine: sa.Engine, pid: int) -> Counter[str]:
    """这个进程在数据库里的连接，按应用名；本机的连接由端口认出。"""
    sockets = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    ports = [int(line[1].rpartition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in sockets]
    names = sa.text(
        "SELECT coalesce(nullif(application_name, ''), '?') FROM pg_stat_activity WHERE client_port = ANY(:ports)"
    )
    with engine.connect() as connection:
        return Counter(connection.scalars(names, {"ports": ports}))
