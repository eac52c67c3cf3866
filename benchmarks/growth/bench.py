"""`pdm run bench growth`：一个事件的各段、一次点击，在空的库、一百万与一千万个订单、十万单的一天、十万单的客户上各要多久。

五套一齐开着，一轮每套一个事件、一次点击；都量完了再让服务器数语句，写日志不算在时间里。
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import click as cli
from rich.console import Console
from rich.table import Table

from benchmarks.dagster.bench import FIRST as FIRST_CLICKED
from benchmarks.dagster.clicks import click
from benchmarks.growth.cases import (
    BUSIEST_CUSTOMER,
    CASES,
    EMPTY,
    TENTH_YEAR,
    Case,
    Filled,
    House,
    filled_databases,
    in_turn,
    running_houses,
)
from benchmarks.growth.server_log import ServerLog, Statements
from benchmarks.latency.observation import Bystander, Observation, milliseconds, publish_and_observe
from benchmarks.raw_imports import add_imports
from benchmarks.report import Bar, Spread, print_bars, write_results
from bridge.events.publish import EventPublisher
from bridge.jetstream.connection import JetStreamConnection
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres

_WARM_UP_ROUNDS = 3
_COUNTED_ROUNDS = 6
"""事件的三种与落在哪一天的两种，各一个。"""
_IDLE_SECONDS = 10.0
"""工人旁边的活每几秒一次；闲着的时候发的，就都是它们的。"""
_NEEDED_BYTES = 30 * 10**9
STAGES = {
    "intake": ("published", "requested"),
    "claim": ("requested", "created"),
    "orders": ("created", "orders"),
    "customers": ("orders", "customers"),
    "leads": ("customers", "leads"),
    "end": ("leads", "seen"),
    "event": ("published", "seen"),
}
"""一段到哪个时刻为止；时刻见 `Observation`。"""


@dataclass
class Measured:
    """一段历史上量到的。"""

    observations: list[Observation] = field(default_factory=list)
    click_seconds: list[float] = field(default_factory=list)
    statements: list[Statements] = field(default_factory=list)

    def spreads(self) -> dict[str, Spread]:
        """毫秒，按段；click 是一次点击。"""
        stages = {name: Spread.of(milliseconds(self.observations, *ends)) for name, ends in STAGES.items()}
        return stages | {"click": Spread.of([seconds * 1000 for seconds in self.click_seconds])}


@cli.command()
@cli.option(
    "--rounds", default=18, show_default=True, type=cli.IntRange(2, 1_000), help="Events and clicks of each history."
)
@cli.option(
    "--tenth-year/--no-tenth-year",
    default=None,
    help="Also 10,000,000 orders: by default where 30 GB of disk are free.",
)
def bench_growth(rounds: int, *, tenth_year: bool | None) -> None:
    """One event, stage by stage, and one click: on an empty database, a long history, a busy day, a busy customer."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if tenth_year is None:
            tenth_year = shutil.disk_usage(folder).free > _NEEDED_BYTES
        if not tenth_year:
            cli.echo(f"without ({TENTH_YEAR.key}) {TENTH_YEAR.title}", err=True)
        cases = [case for case in CASES if case is not TENTH_YEAR or tenth_year]
        server = Path(folder) / "postgres"
        clicks = rounds + _WARM_UP_ROUNDS
        with (
            EmbeddedPostgres(server) as url,
            filled_databases(url, cases, clicks) as filled,
            running_houses(Path(folder), filled) as houses,
        ):
            measured = asyncio.run(measure(houses, ServerLog(server), rounds))
    print_figures(cases, measured)
    bars = list(bars_of(filled, measured))
    print_bars(bars)
    figures = {
        one.case.key: {
            "history": one.case.title,
            "database_bytes": one.size_bytes,
            "changed_by_the_product": one.changes,
            "milliseconds": measured[one.case.key].spreads(),
            "statements": measured[one.case.key].statements,
        }
        for one in filled
    }
    path = write_results("growth", bars, {"figures": figures})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


async def measure(houses: list[House], log: ServerLog, rounds: int) -> dict[str, Measured]:
    """热身，量，再数语句。"""
    measured: dict[str, Measured] = defaultdict(Measured)
    async with AsyncExitStack() as cleanup:
        observe = {house.case.key: await cleanup.enter_async_context(observing(house)) for house in houses}
        for number in range(_WARM_UP_ROUNDS + rounds):
            cli.echo(f"round {number + 1} of {_WARM_UP_ROUNDS + rounds}", err=True)
            for house in in_turn(houses, number):
                observation = await observe[house.case.key](number)
                day = FIRST_CLICKED + timedelta(days=number)
                seconds = await asyncio.to_thread(click, house.addresses.ui_url, day.isoformat())
                if number >= _WARM_UP_ROUNDS:
                    measured[house.case.key].observations.append(observation)
                    measured[house.case.key].click_seconds.append(seconds)
        with log.recording():
            start = log.size()
            await asyncio.sleep(_IDLE_SECONDS)
            beside = {key: log.texts(start, one.observations[-1].worker_pid) for key, one in measured.items()}
            for number in range(_COUNTED_ROUNDS):
                for house in houses:
                    start = log.size()
                    observation = await observe[house.case.key](_WARM_UP_ROUNDS + rounds + number)
                    measured[house.case.key].statements.append(
                        log.count(start, observation.worker_pid, beside[house.case.key])
                    )
    return dict(measured)


@asynccontextmanager
async def observing(house: House) -> AsyncIterator[Callable[[int], Awaitable[Observation]]]:
    """给出：发第几个事件，看它走完。"""
    connection = JetStreamConnection(house.bridge_settings, name="benchmark")
    await connection.open()
    bystander = Bystander()
    await bystander.listen(connection)
    async with EventPublisher(house.bridge_settings) as publisher:

        async def observe(number: int) -> Observation:
            order = house.case.order(number)
            (import_id,) = await asyncio.to_thread(add_imports, house.engine, [order])
            return await publish_and_observe(house.engine, publisher, connection, bystander, import_id, order.day)

        yield observe
    await connection.close()


def bars_of(filled: Sequence[Filled], measured: dict[str, Measured]) -> Iterator[Bar]:
    """别的历史与几乎是空的相比；语句数在各段历史上要一样。"""
    spreads = {key: one.spreads() for key, one in measured.items()}

    def times(case: Case, stage: str) -> float:
        return spreads[case.key][stage].median / spreads[EMPTY.key][stage].median

    for one in filled:
        if one.case in (EMPTY, BUSIEST_CUSTOMER):
            continue
        for stage, name in (("event", "publish to SUCCESS"), ("click", "click to SUCCESS")):
            yield Bar(f"({one.case.key}) {one.case.title}: {name}", times(one.case, stage), "times (a)", 1.3, "most")
    yield Bar(
        f"({BUSIEST_CUSTOMER.key}) {BUSIEST_CUSTOMER.title}: orders",
        times(BUSIEST_CUSTOMER, "orders"),
        "times (a)",
        1.3,
        "most",
    )
    counts = [fewest(one.statements) for one in measured.values()]
    yield Bar("statements from claim to SUCCESS, one order", max(counts), "statements", 45, "most")
    yield Bar(
        "statements: the most of a history over the fewest of another",
        max(counts) - min(counts),
        "statements",
        0,
        "most",
    )
    yield Bar(
        "changes by the product to days of the filled histories",
        sum(len(one.changes) for one in filled),
        "changes",
        0,
        "most",
    )


def fewest(statements: Sequence[Statements]) -> int:
    """最少的一次：旁边的活偶尔会插进来几条。"""
    return min(counted.all for counted in statements)


def print_figures(cases: Sequence[Case], measured: dict[str, Measured]) -> None:
    table = Table(
        "median ms (min - max)", *(f"({case.key})" for case in cases), *(f"{case.key} / a" for case in cases[1:])
    )
    spreads = {key: one.spreads() for key, one in measured.items()}
    for stage in (*STAGES, "click"):
        of_stage = [spreads[case.key][stage] for case in cases]
        shown = [f"{spread.median:.0f} ({spread.min:.0f} - {spread.max:.0f})" for spread in of_stage]
        table.add_row(stage, *shown, *(f"{spread.median / of_stage[0].median:.2f}" for spread in of_stage[1:]))
    for name in ("data", "data_transactions", "dagster"):
        counts = [min(getattr(counted, name) for counted in measured[case.key].statements) for case in cases]
        table.add_row(
            f"statements: {name.replace('_', ' of ')}", *(str(count) for count in counts), *([""] * (len(cases) - 1))
        )
    Console(width=200).print(table)
