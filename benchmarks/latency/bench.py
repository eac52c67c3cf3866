"""`pdm run bench latency`：一秒一个事件，各有一个新订单；从发出到三张表都提交、运行 SUCCESS，分段来看，并与原样的 Dagster 比。

库里已有一百万个订单。一半的事件落在最新的一天，一半各有自己的一天；一半是新客户的，一半是老客户的。先有几个不计的热身。两边交替：一段热的，一个原样的；
原样的那个做完，才有下一段；它的进程一直开着，传感器也一直在看。
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.dagster.stock import stock_dagster
from benchmarks.history import LAST_DAY, ORDINARY, fill_ordinary
from benchmarks.latency import stock_location
from benchmarks.latency.observation import Bystander, Observation, milliseconds, publish_and_observe, wait_for_stock
from benchmarks.latency.stock_location import STOCK_SUBJECT
from benchmarks.raw_imports import add_imports, new_order
from benchmarks.report import Bar, Spread, print_bars, write_results
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.services.target_schema import prepare_target

_FIRST_STOCK_DAY = date(2010, 1, 1)
_WARM_UP = 5
_APART = 7_919
"""质数：老客户散在各处。"""
_STOCK_SCHEMA = "stock"
_STAGES = (
    ("published -> stored in EVENTS", "published", "stored"),
    ("-> in the ledger, before its commit", "stored", "requested"),
    ("-> doorbell in TASKS", "requested", "rung"),
    ("-> claimed by a worker", "rung", "claimed"),
    ("-> run created", "claimed", "created"),
    ("-> orders written, before the commit", "created", "orders"),
    ("-> customers written, before the commit", "orders", "customers"),
    ("-> leads written, before the commit", "customers", "leads"),
    ("-> run SUCCESS", "leads", "succeeded"),
    ("-> SUCCESS seen by a client", "succeeded", "seen"),
)


@dataclass(frozen=True)
class Timing:
    """毫秒。"""

    name: str
    median: float
    p99: float
    min: float

    @classmethod
    def of(cls, name: str, values: Sequence[float]) -> Timing:
        p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
        return cls(name=name, median=statistics.median(values), p99=p99, min=min(values))


@cli.command()
@cli.option("--events", default=60, show_default=True, type=cli.IntRange(10, 2_000), help="Events of the warm side.")
@cli.option(
    "--rate", default=1.0, show_default=True, type=cli.FloatRange(0.1, 5), help="Events per second of the warm side."
)
@cli.option(
    "--stock-events",
    default=5,
    show_default=True,
    type=cli.IntRange(2, 100),
    help="Events of stock Dagster, one at a time.",
)
def bench_latency(events: int, rate: float, stock_events: int) -> None:
    """Event published to three tables committed and run SUCCESS, stage by stage, against a stock Dagster sensor."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(
            Path(folder) / "warm",
            settings=EtlSettings(database_url=""),
            bridge_settings=BridgeSettings(nats_url=""),
            port=find_free_port(),
        )
        with stack as addresses:
            settings = EtlSettings(database_url=addresses.database_url)
            engine = build_engine(settings)
            fill_ordinary(engine, settings)
            prepare_target(engine, EtlSettings(database_url=addresses.database_url, target_schema=_STOCK_SCHEMA))
            environment = {
                **os.environ,
                **addresses.environment(),
                "ETL_TARGET_SCHEMA": _STOCK_SCHEMA,
                "DAGSTER_DISABLE_TELEMETRY": "1",
            }
            with stock_dagster(Path(folder) / "stock", addresses, environment, code_module=stock_location.__name__):
                observations, stock = asyncio.run(
                    measure(
                        engine,
                        BridgeSettings(nats_url=addresses.nats_url),
                        events=events,
                        rate=rate,
                        stock_events=stock_events,
                    )
                )
            engine.dispose()
    stages = [Timing.of(name, milliseconds(observations, first, last)) for name, first, last in _STAGES]
    total = Timing.of("published -> SUCCESS seen", milliseconds(observations, "published", "seen"))
    announced = Timing.of(
        "published -> leads announced in EVENTS", milliseconds(observations, "published", "announced")
    )
    print_figures(stages, total, announced, stock, events)
    bars = [
        Bar("event to three tables and SUCCESS, median", total.median, "ms", 200, "most"),
        Bar("event to three tables and SUCCESS, p99", total.p99, "ms", 500, "most"),
        Bar("event to SUCCESS: stock Dagster takes", stock.median * 1000 / total.median, "times as long", 40, "least"),
    ]
    print_bars(bars)
    figures = {
        "stages_ms": stages,
        "total_ms": total,
        "announced_ms": announced,
        "stock_seconds": stock,
        "events": events,
        "rate": rate,
    }
    path = write_results("latency", bars, {"figures": figures})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


async def measure(
    engine: sa.Engine, settings: BridgeSettings, *, events: int, rate: float, stock_events: int
) -> tuple[list[Observation], Spread]:
    """热身之后，热的分成与原样的一样多段，轮流来。"""
    connection = JetStreamConnection(settings, name="benchmark")
    await connection.open()
    bystander = Bystander()
    await bystander.listen(connection)
    observations: list[Observation] = []
    stock_seconds: list[float] = []
    async with EventPublisher(settings) as publisher:
        observe = partial(observe_block, engine, publisher, connection, bystander, rate=rate)
        cli.echo("warming up", err=True)
        await observe(range(_WARM_UP))
        await _run_stock(engine, publisher, 0)
        for block in range(stock_events):
            numbers = range(_WARM_UP + events * block // stock_events, _WARM_UP + events * (block + 1) // stock_events)
            cli.echo(
                f"events {numbers.start - _WARM_UP + 1} to {numbers.stop - _WARM_UP} of {events}, then one of stock Dagster",
                err=True,
            )
            observations += await observe(numbers)
            stock_seconds.append(await _run_stock(engine, publisher, block + 1))
    await connection.close()
    return observations, Spread.of(stock_seconds)


async def observe_block(
    engine: sa.Engine,
    publisher: EventPublisher,
    connection: JetStreamConnection,
    bystander: Bystander,
    numbers: Sequence[int],
    *,
    rate: float,
) -> list[Observation]:
    """按时刻表发出，不等前一个做完：慢的藏不住。单数的都在最新的一天，双数的各有自己的一天；每四个里有两个是老客户的。"""

    async def observe(number: int, due: float) -> Observation:
        day = LAST_DAY if number % 2 else ORDINARY.first_day + timedelta(days=2 * number % ORDINARY.days)
        customer = ORDINARY.customer_of(number * _APART) if number % 4 < 2 else None
        (import_id,) = await asyncio.to_thread(add_imports, engine, [new_order(day, customer)])
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        return await publish_and_observe(engine, publisher, connection, bystander, import_id, day)

    started = time.monotonic() + 1
    return list(
        await asyncio.gather(*(observe(number, started + place / rate) for place, number in enumerate(numbers)))
    )


async def _run_stock(engine: sa.Engine, publisher: EventPublisher, number: int) -> float:
    """一个事件从发出到原样的 Dagster 的运行 SUCCESS，秒。"""
    day = _FIRST_STOCK_DAY + timedelta(days=2 * number)
    (import_id,) = await asyncio.to_thread(add_imports, engine, [new_order(day)])
    published = time.time()
    await publisher.publish(STOCK_SUBJECT, DataImportCompleted(import_id=import_id))
    return await asyncio.to_thread(wait_for_stock, engine, day) - published


def print_figures(stages: Sequence[Timing], total: Timing, announced: Timing, stock: Spread, events: int) -> None:
    table = Table(f"{events} events, one new order each", "median ms", "p99 ms", "min ms")
    for timing in stages:
        table.add_row(timing.name, f"{timing.median:.1f}", f"{timing.p99:.1f}", f"{timing.min:.1f}")
    explained = sum(timing.median for timing in stages)
    table.add_row(
        "sum of the medians, and what it leaves of the total",
        f"{explained:.1f} + {total.median - explained:.1f}",
        "",
        "",
    )
    for timing in (total, announced):
        table.add_row(timing.name, f"{timing.median:.1f}", f"{timing.p99:.1f}", f"{timing.min:.1f}")
    table.add_row(
        f"stock Dagster: published -> SUCCESS seen, {stock.runs} events",
        f"{stock.median * 1000:,.0f}",
        f"{stock.max * 1000:,.0f} (max)",
        f"{stock.min * 1000:,.0f}",
    )
    Console().print(table)
