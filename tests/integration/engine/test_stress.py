"""八个工人进程抢同样那些客户，导入、撤回、人的改动同时发生：没有冲突传到运行，最后与参照实现一样。"""

from __future__ import annotations

import logging
from concurrent.futures import wait
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from hypothesis import settings

from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME
from tests.integration.engine.chain import Chain
from tests.integration.engine.history import FIRST_DAY, Event, Finish, Import, Touch, Withdraw
from tests.integration.engine.workers import Labour, labour, start_workers
from tests.integration.engine.world import World

WORKERS = 8
DAYS = 12
ORDERS = 20  # 再多，撤回时就要问准不准删了
CUSTOMERS = 6
ROWS_PER_IMPORT = 12
SECONDS = 60 if settings.get_current_profile_name() == "deep" else 5
SECONDS_BETWEEN_CHANGES = 0.3


def test_eight_workers_on_the_same_customers_never_fail_and_converge(chain: Chain) -> None:
    randomness = Random(20260105)  # noqa: S311  # 只为每次都一样
    with start_workers(WORKERS) as processes:
        world = World(chain, processes)
        days = (FIRST_DAY, FIRST_DAY + timedelta(days=DAYS - 1))
        world.happen(random_import(randomness))
        running = [
            processes.submit(labour, world.chain.settings, days, seed=seed, seconds=SECONDS) for seed in range(WORKERS)
        ]
        while wait(running, timeout=SECONDS_BETWEEN_CHANGES).not_done:
            world.happen(random_change(randomness))
        labours = [future.result() for future in running]
    total = sum(labours, Labour())
    logging.getLogger(__name__).info("%s runs, %s conflicts tried again", total.runs, total.conflicts)
    assert min(each.runs for each in labours) > 0
    world.settle_and_compare(Finish(by_person=True, day_by_day=False, order=()))


def random_change(randomness: Random) -> Event:
    kind = randomness.random()
    if kind < 0.6:
        return random_import(randomness)
    if kind < 0.85:
        return Withdraw(randomness.randrange(1000))
    closing = {"closed_by": "user", "closed_at": random_moment(randomness), "current_stage": "LOST"}
    return Touch(randomness.randrange(1000), randomness.choice([closing, {"owner": "王五"}]), told=None)


def random_import(randomness: Random) -> Import:
    return Import(
        tuple(random_row(randomness) for _ in range(ROWS_PER_IMPORT)),
        datetime(2026, 6, 1, tzinfo=UTC) + randomness.random() * ONE_DAY,
    )


def random_row(randomness: Random) -> dict[str, Any]:
    return {
        "order_id": f"A-{randomness.randrange(ORDERS)}",
        "shop": SAMPLE_SHOP_NAME,
        "customer_name": f"客户{randomness.randrange(CUSTOMERS)}",
        "order_type": randomness.choice(["大货订单", "打样订单"]),
        "order_status": randomness.choice(["completed", "new", "cancelled"]),
        "amount": f"{randomness.randrange(-500, 5000)}.{randomness.randrange(100):02}",
        "quantity": randomness.choice([1, 1, 1, 2, -1]),
        "ordered_at": random_moment(randomness),
    }


def random_moment(randomness: Random) -> datetime:
    return datetime(2026, 1, 5, tzinfo=UTC) + randomness.random() * (DAYS - 1) * ONE_DAY


ONE_DAY = timedelta(days=1)
