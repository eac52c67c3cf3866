"""`pdm run bench burst`：库里已有一百万个订单，再来一万个事件，NATS 收得多快就发多快；台账跟不跟得上，一天做几个运行，多久做完。"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.history import LAST_DAY, fill_ordinary
from benchmarks.own_stack import own_stack
from benchmarks.raw_imports import add_imports, new_order
from benchmarks.report import Bar, print_bars, write_results
from benchmarks.verification import count_wrong
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import DAGSTER_SCHEMA
from etl_assets.core.etl_tables import import_events, ledger
from etl_assets.orchestration.asset_runs import tagged_days

_IN_FLIGHT = 256
"""再多，这个进程也只是在排队。"""
_POLL_SECONDS = 0.02
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Burst:
    """时刻都从第一个事件发出算起。published 与 handled：最后一个事件存进流、进台账；done：再没有到期的日子。"""

    events: int
    days: int
    published_seconds: float
    handled_seconds: float
    done_seconds: float
    runs: int
    runs_per_day: int

    @property
    def published_per_second(self) -> float:
        return self.events / self.published_seconds

    @property
    def handled_per_second(self) -> float:
        return self.events / self.handled_seconds


@cli.command()
@cli.option(
    "--events",
    default=10_000,
    show_default=True,
    type=cli.IntRange(10, 1_000_000),
    help="One import with one order each.",
)
@cli.option(
    "--days",
    default=30,
    show_default=True,
    type=cli.IntRange(1, 150),
    help="The events are spread over these days in turn.",
)
def bench_burst(events: int, days: int) -> None:
    """Thousands of events at once: into the ledger, few runs, all days materialized."""
    with own_stack() as (engine, settings, bridge_settings):
        fill_ordinary(engine, settings)
        _warm_up(engine, bridge_settings)
        burst = measure_burst(
            engine, bridge_settings, events, [LAST_DAY - timedelta(days=offset) for offset in range(days)]
        )
        wrong = count_wrong(engine)
    print_figures(burst)
    bars = [
        Bar(
            "into the ledger, against the rate that NATS takes",
            burst.handled_per_second / burst.published_per_second,
            "of it",
            0.8,
            "least",
        ),
        Bar("runs per day", burst.runs_per_day, "runs", 3, "most"),
        Bar(
            "last day materialized after the last event", burst.done_seconds - burst.published_seconds, "s", 15, "most"
        ),
        Bar("rows that one statement over all raw rows finds wrong", sum(wrong.values()), "rows", 0, "most"),
    ]
    print_bars(bars)
    path = write_results("burst", bars, {"figures": burst, "wrong": wrong})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


def measure_burst(engine: sa.Engine, bridge_settings: BridgeSettings, events: int, days: Sequence[date]) -> Burst:
    """导入先都写好；从第一个事件发出到再没有到期的日子。"""
    import_ids = add_imports(engine, [new_order(days[number % len(days)]) for number in range(events)])
    handled_before = _count_handled(engine)
    started, published_seconds, handled_seconds = asyncio.run(
        _publish_and_watch(engine, bridge_settings, import_ids, handled_before + events)
    )
    done_seconds = wait_until(started, lambda: not count_due(engine))
    runs = _runs_per_day(engine, days)
    return Burst(
        events=events,
        days=len(days),
        published_seconds=published_seconds,
        handled_seconds=handled_seconds,
        done_seconds=done_seconds,
        runs=len(runs),
        runs_per_day=max(Counter(day for run in runs for day in run).values()),
    )


async def _publish_and_watch(
    engine: sa.Engine, bridge_settings: BridgeSettings, import_ids: Sequence[UUID], handled: int
) -> tuple[float, float, float]:
    async with EventPublisher(bridge_settings) as publisher:
        started = time.perf_counter()
        watching = asyncio.create_task(
            asyncio.to_thread(wait_until, started, lambda: _count_handled(engine) >= handled)
        )
        await _publish(publisher, import_ids)
        published_seconds = time.perf_counter() - started
        return started, published_seconds, await watching


async def _publish(publisher: EventPublisher, import_ids: Sequence[UUID]) -> None:
    """总有 `_IN_FLIGHT` 个在等流的确认。"""
    waiting = iter(import_ids)

    async def publish_on() -> None:
        for import_id in waiting:
            await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))

    await asyncio.gather(*(publish_on() for _ in range(_IN_FLIGHT)))


def _warm_up(engine: sa.Engine, bridge_settings: BridgeSettings) -> None:
    """一个事件走完全程，在别的一天：监听器与工人的第一次不算。"""
    handled_before = _count_handled(engine)
    asyncio.run(publish_imports(bridge_settings, add_imports(engine, [new_order(LAST_DAY - timedelta(days=200))])))
    wait_until(time.perf_counter(), lambda: _count_handled(engine) > handled_before and not count_due(engine))


async def publish_imports(bridge_settings: BridgeSettings, import_ids: Sequence[UUID]) -> None:
    """这些导入的事件都存进流。"""
    async with EventPublisher(bridge_settings) as publisher:
        await _publish(publisher, import_ids)


def wait_until(started: float, met: Callable[[], bool], *, timeout_seconds: float = _TIMEOUT_SECONDS) -> float:
    """:raises RuntimeError: 太久了。"""
    while not met():
        if time.perf_counter() - started > timeout_seconds:
            raise RuntimeError(f"not over after {timeout_seconds:g} s: look into the logs of the stack")
        time.sleep(_POLL_SECONDS)
    return time.perf_counter() - started


def _count_handled(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(import_events)).scalar_one()


def count_due(engine: sa.Engine) -> int:
    """还到期的资产日，搁置的也算。"""
    due = sa.select(sa.func.count()).select_from(ledger).where(ledger.c.requested > ledger.c.materialized)
    with engine.connect() as connection:
        return connection.execute(due).scalar_one()


def _runs_per_day(engine: sa.Engine, days: Sequence[date]) -> list[list[date]]:
    """碰过这些日子的每个 Dagster 运行，各碰了哪几天；失败的也算。"""
    tags = sa.table("run_tags", sa.column("run_id"), sa.column("key"), sa.column("value"), schema=DAGSTER_SCHEMA)
    by_run = sa.select(sa.func.jsonb_object_agg(tags.c.key, tags.c.value)).group_by(tags.c.run_id)
    with engine.connect() as connection:
        ranges = [tagged_days(of_run) for of_run in connection.scalars(by_run)]
    return [touched for run in ranges if run and (touched := [day for day in run if day in set(days)])]


def print_figures(burst: Burst) -> None:
    table = Table(f"{burst.events:,} events over {burst.days} days", "s after the first event", "events/s")
    table.add_row("all stored by NATS", f"{burst.published_seconds:.2f}", f"{burst.published_per_second:,.0f}")
    table.add_row("all in the ledger", f"{burst.handled_seconds:.2f}", f"{burst.handled_per_second:,.0f}")
    table.add_row("all days materialized", f"{burst.done_seconds:.2f}", f"{burst.events / burst.done_seconds:,.0f}")
    Console().print(table)
    cli.echo(f"{burst.runs} runs, at most {burst.runs_per_day} of one day")
