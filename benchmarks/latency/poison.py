"""`pdm run bench poison`：坏事件一秒一千个，连着十秒；再是两万个等导入的事件，同样快：来的时候，与都在等的时候。

同时好的事件一秒一个：慢了多少。
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.latency.bench import Timing, observe_block
from benchmarks.latency.observation import Bystander, milliseconds
from benchmarks.own_stack import own_stack
from benchmarks.report import Bar, print_bars, write_results
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.nats_names import EVENTS_DLQ_STREAM
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.reports.reports import count_waiting_events
from etl_assets.testing.raw_data import RawData

_WARM_UP = 5
_TICK_SECONDS = 0.05
_PATIENCE_SECONDS = 60
_IN_FLIGHT = 100


@dataclass(frozen=True)
class Flood:
    """真正发出的事件，一秒几个；arrived 个到了它们该去的地方：死信流，或台账里在等的。"""

    published: int
    per_second: float
    arrived: int


@dataclass(frozen=True)
class Measured:
    """好事件的延迟，与两回洪水；两回之前各量一次没有洪水的。"""

    quiet: Timing
    in_poison: Timing
    poison: Flood
    quiet_again: Timing
    while_arriving: Timing
    while_waiting: Timing
    waiting: Flood


@cli.command()
@cli.option(
    "--rate", default=1_000, show_default=True, type=cli.IntRange(20, 100_000), help="Events of a flood per second."
)
@cli.option("--seconds", default=10, show_default=True, type=cli.IntRange(5, 600), help="Seconds of each measurement.")
@cli.option(
    "--waiting",
    default=20_000,
    show_default=True,
    type=cli.IntRange(20, 1_000_000),
    help="Events whose imports are not there.",
)
def bench_poison(rate: int, seconds: int, waiting: int) -> None:
    """A flood of unusable events, then one of events that must wait: how much slower do the good ones become?"""
    with own_stack() as (engine, settings, bridge_settings):
        RawData(engine)
        measured = asyncio.run(measure(engine, settings, bridge_settings, rate=rate, seconds=seconds, waiting=waiting))
    table = Table("published -> SUCCESS seen, one good event a second", "median ms", "p99 ms", "min ms")
    for timing in (
        measured.quiet,
        measured.in_poison,
        measured.quiet_again,
        measured.while_arriving,
        measured.while_waiting,
    ):
        table.add_row(timing.name, f"{timing.median:.1f}", f"{timing.p99:.1f}", f"{timing.min:.1f}")
    Console().print(table)
    for name, flood in (
        ("poison events, dead-lettered", measured.poison),
        ("events that wait, in the ledger", measured.waiting),
    ):
        cli.echo(f"{flood.published:,} at {flood.per_second:,.0f} per second {name}: {flood.arrived:,}")
    poison, late = measured.poison, measured.waiting
    unit = "times as long as without"
    bars = [
        Bar("good events in the flood, median", measured.in_poison.median / measured.quiet.median, unit, 2, "most"),
        Bar(
            "good events while waiting ones arrive, median",
            measured.while_arriving.median / measured.quiet_again.median,
            unit,
            2,
            "most",
        ),
        Bar(
            "good events while all of them wait, median",
            measured.while_waiting.median / measured.quiet_again.median,
            unit,
            2,
            "most",
        ),
        Bar("poison events that are not dead-lettered", poison.published - poison.arrived, "events", 0, "most"),
        Bar("waiting events that are not in the ledger", late.published - late.arrived, "events", 0, "most"),
    ]
    print_bars(bars)
    path = write_results("poison", bars, {"figures": measured})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


async def measure(
    engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, *, rate: int, seconds: int, waiting: int
) -> Measured:
    connection = JetStreamConnection(bridge_settings, name="benchmark")
    await connection.open()
    bystander = Bystander()
    await bystander.listen(connection)
    numbers = iter(range(1_000_000))
    async with EventPublisher(bridge_settings) as publisher:

        async def observe(name: str, count: int = seconds) -> Timing:
            block = [next(numbers) for _ in range(count)]
            observed = await observe_block(engine, publisher, connection, bystander, block, rate=1)
            return Timing.of(name, milliseconds(observed, "published", "seen"))

        def count_waiting() -> int:
            with engine.connect() as reading:
                return int(count_waiting_events(reading, settings).events)

        async def count_letters() -> int:
            return (await connection.context.stream_info(EVENTS_DLQ_STREAM)).state.messages

        await observe("warm-up", _WARM_UP)
        quiet = await observe("without poison")
        flooding = asyncio.create_task(
            _flood(connection, lambda: b"\xff not an event", rate=rate, count=rate * (seconds + 1))
        )
        in_poison = await observe("in the flood of poison")
        published, per_second = await flooding
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while (letters := await count_letters()) < published:
                await asyncio.sleep(0.2)
        poison = Flood(published, per_second, letters)

        quiet_again = await observe("without poison, again")
        flooding = asyncio.create_task(_flood(connection, _event_without_import, rate=rate, count=waiting))
        while_arriving = await observe("while waiting ones arrive")
        published, per_second = await flooding
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while (remembered := await asyncio.to_thread(count_waiting)) < published:
                await asyncio.sleep(0.2)
        while_waiting = await observe("while all of them wait")
    await connection.close()
    late = Flood(published, per_second, remembered)
    return Measured(quiet, in_poison, poison, quiet_again, while_arriving, while_waiting, late)


def _event_without_import() -> bytes:
    return DataImportCompleted(import_id=uuid4()).model_dump_json().encode()


async def _flood(
    connection: JetStreamConnection, body: Callable[[], bytes], *, rate: float, count: int
) -> tuple[int, float]:
    """按时刻表发，到 count 个为止；NATS 来不及存就等它。返回发出的个数与真正的速度。"""
    started, published = time.monotonic(), 0
    sending: set[asyncio.Task[object]] = set()
    while published < count:
        due = min(int((time.monotonic() - started) * rate), count) - published
        for _ in range(min(due, _IN_FLIGHT - len(sending))):
            task = asyncio.create_task(connection.publish(DATA_IMPORT_COMPLETED, body(), message_id=str(uuid4())))
            sending.add(task)
            task.add_done_callback(sending.discard)
            published += 1
        await asyncio.sleep(_TICK_SECONDS)
    await asyncio.gather(*sending)
    return published, published / (time.monotonic() - started)
