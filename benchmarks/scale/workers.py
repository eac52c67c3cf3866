"""工人等着远处的服务器：它们的每条连接，往返都要 100 毫秒；其余都是产品平常的路。

两种运行：一天一个客户的一个订单；一天一百个客户各一个订单——客户的锁按散列分条，客户多的运行会不会一个等一个，看后一种。
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import click
import sqlalchemy as sa

from benchmarks.burst.bench import count_due, publish_imports, wait_until
from benchmarks.history import LAST_DAY, History
from benchmarks.raw_imports import add_imports_of, new_order
from benchmarks.scale.parts import IdleTime, Part, Site, running_part, running_site
from tests.chaos.network import Network

ROUND_TRIP_SECONDS = 0.1
HISTORY = History(LAST_DAY, days=1_000, imports=1_000, orders=100_000, customers=20_000)
_DUE_DAYS = 450
"""排着的比哪一次做得完的都多：队伍从不见底。"""
_WARM_RUNS = 2
"""每个工人的头几个运行不算：代码、连接、规划器的统计都是凉的。"""
_ASSETS = 3
_SAMPLE_SECONDS = 0.1
_LOCKED = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


@dataclass(frozen=True)
class Load:
    """一个运行有几个客户的订单。"""

    name: str
    customers: int


LOADS = (Load("1 customer a run", 1), Load("100 customers a run", 100))


@dataclass(frozen=True)
class Crew:
    """一个数是一个管理者（一台主机）的工人进程。"""

    managers: tuple[int, ...]

    @property
    def name(self) -> str:
        return " + ".join(map(str, self.managers))

    @property
    def workers(self) -> int:
        return sum(self.managers)


CREWS = (Crew((1,)), Crew((2,)), Crew((4,)), Crew((8,)), Crew((4, 4)))


@dataclass(frozen=True)
class Pace:
    """一组工人一次量到的。"""

    load: str
    crew: str
    workers: int
    runs_per_second: float
    runs: int
    idle_share: float
    locked_share: float
    """工人等着别人的锁的时间，占它们全部时间的几成。"""


def make_days_due(site: Site, load: Load) -> None:
    """隔一天一个，运行不会把几天连在一起做；挨着的几天没有同一个客户。"""
    imports = [
        [
            new_order(LAST_DAY - timedelta(days=2 * number), HISTORY.customer_of(number * load.customers + place))
            for place in range(load.customers)
        ]
        for number in range(_DUE_DAYS)
    ]
    asyncio.run(publish_imports(site.bridge_settings, add_imports_of(site.engine, imports)))
    wait_until(time.perf_counter(), lambda: count_due(site.engine) >= _DUE_DAYS)


def measure_workers(seconds: float, rounds: int, crews: Sequence[Crew] = CREWS) -> list[Pace]:
    """每一轮每种运行每组工人各一次。"""
    with (
        running_site(HISTORY) as site,
        running_part("listen", environment=site.environment),
        Network(delay_seconds=ROUND_TRIP_SECONDS / 2) as network,
    ):
        far_away = network.reroute("workers", site.environment)
        return [
            measure_crew(site, far_away, load, crew, seconds)
            for number in range(rounds)
            for load in LOADS
            for crew in (crews if number % 2 == 0 else crews[::-1])
        ]


def measure_crew(site: Site, far_away: Mapping[str, str], load: Load, crew: Crew, seconds: float) -> Pace:
    """:param far_away: 工人的环境变量，指着远处的服务器。"""
    make_days_due(site, load)
    with ExitStack() as cleanup:
        parts = [
            cleanup.enter_context(running_part("worker", "--processes", str(processes), environment=far_away))
            for processes in crew.managers
        ]
        wait_until(time.perf_counter(), lambda: _is_warm(parts, crew))
        started, idle = time.time(), IdleTime()
        waiting = _waiting_for_locks(site.engine, started + seconds)
        idle_share = idle.share()
        ends = [ends for part in parts for ends in part.run_ends().values()]
        if count_due(site.engine) < crew.workers * _ASSETS:
            raise RuntimeError("the workers ran out of work: the figures mean nothing")
    pace = Pace(
        load=load.name,
        crew=crew.name,
        workers=crew.workers,
        runs_per_second=sum(_per_second(one, started, started + seconds) for one in ends),
        runs=sum(started < end <= started + seconds for one in ends for end in one),
        idle_share=idle_share,
        locked_share=waiting / crew.workers,
    )
    click.echo(
        f"{load.name}, {crew.name}: {pace.runs_per_second:.2f} runs/s, idle {idle_share:.0%}, locked {pace.locked_share:.1%}",
        err=True,
    )
    return pace


def _waiting_for_locks(engine: sa.Engine, until: float) -> float:
    """到那时为止，平均有几个会话在等锁。"""
    seen: list[int] = []
    while time.time() < until:
        with engine.connect() as connection:
            seen.append(connection.execute(_LOCKED).scalar_one())
        time.sleep(_SAMPLE_SECONDS)
    return sum(seen) / len(seen)


def _is_warm(parts: Sequence[Part], crew: Crew) -> bool:
    ends = [ends for part in parts for ends in part.run_ends().values()]
    return len(ends) == crew.workers and all(len(one) >= _WARM_RUNS for one in ends)


def _per_second(ends: Sequence[float], since: float, until: float) -> float:
    """一个工人的：从窗口之前最后一个做完的，到窗口里最后一个做完的；切断的运行不算。

    :raises RuntimeError: 窗口里一个也没有做完。
    """
    *_, last_before = (end for end in ends if end <= since)
    within = [end for end in ends if since < end <= until]
    if not within:
        raise RuntimeError("a worker ended no run in the window: give --seconds more")
    return len(within) / (within[-1] - last_before)
