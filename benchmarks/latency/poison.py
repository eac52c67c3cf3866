"""`pdm run bench poison`：毒事件一秒一千个，连着十秒；同时好的事件一秒一个，慢了多少。"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.latency.bench import Timing, observe_block
from benchmarks.latency.observation import Bystander, milliseconds
from benchmarks.raw_imports import add_shop
from benchmarks.report import Bar, print_bars, write_results
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED, EVENTS_DLQ_STREAM
from bridge.jetstream import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.loopback_port import find_free_port
from etl_assets.core.settings import EtlSettings

_WARM_UP = 5
_TICK_SECONDS = 0.05


@dataclass(frozen=True)
class Flood:
    """真正发出的毒事件，一秒几个，有几个进了死信流。"""

    published: int
    per_second: float
    dead_letters: int


@cli.command()
@cli.option("--rate", default=1_000, show_default=True, type=cli.IntRange(20, 100_000), help="Poison events per second.")
@cli.option("--seconds", default=10, show_default=True, type=cli.IntRange(5, 600), help="Seconds without it, then with it.")
def bench_poison(rate: int, seconds: int) -> None:
    """A flood of unusable events: how much slower do the good ones become?"""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(
            Path(folder), settings=EtlSettings(database_url=""), bridge_settings=BridgeSettings(nats_url=""), port=find_free_port()
        )
        with stack as addresses:
            engine = build_engine(EtlSettings(database_url=addresses.database_url))
            add_shop(engine)
            quiet, flooded, flood = asyncio.run(measure(engine, BridgeSettings(nats_url=addresses.nats_url), rate, seconds))
            engine.dispose()
    table = Table("published -> SUCCESS seen, one good event a second", "median ms", "p99 ms", "min ms")
    for timing in (quiet, flooded):
        table.add_row(timing.name, f"{timing.median:.1f}", f"{timing.p99:.1f}", f"{timing.min:.1f}")
    Console().print(table)
    cli.echo(f"{flood.published:,} poison events at {flood.per_second:,.0f} per second, {flood.dead_letters:,} of them dead-lettered")
    bars = [
        Bar("good events in the flood, median", flooded.median / quiet.median, "times as long as without", 2, "most"),
        Bar("poison events that are not dead-lettered", flood.published - flood.dead_letters, "events", 0, "most"),
    ]
    print_bars(bars)
    path = write_results("poison", bars, {"figures": {"quiet": quiet, "flooded": flooded, "flood": flood}})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


async def measure(engine: sa.Engine, settings: BridgeSettings, rate: int, seconds: int) -> tuple[Timing, Timing, Flood]:
    connection = JetStreamConnection(settings, name="benchmark")
    await connection.open()
    bystander = Bystander()
    await bystander.listen(connection)
    async with EventPublisher(settings) as publisher:

        async def observe(name: str, first: int, count: int) -> Timing:
            observed = await observe_block(engine, publisher, connection, bystander, range(first, first + count), rate=1)
            return Timing.of(name, milliseconds(observed, "published", "seen"))

        await observe("warm-up", 0, _WARM_UP)
        quiet = await observe("without poison", _WARM_UP, seconds)
        flooding = asyncio.create_task(_flood(connection, rate, seconds + 1))
        flooded = await observe("in the flood", _WARM_UP + seconds, seconds)
        published, per_second = await flooding
    dead_letters = 0
    async with asyncio.timeout(60):
        while dead_letters < published:
            dead_letters = (await connection.context.stream_info(EVENTS_DLQ_STREAM)).state.messages
            await asyncio.sleep(0.2)
    await connection.close()
    return quiet, flooded, Flood(published, per_second, dead_letters)


async def _flood(connection: JetStreamConnection, rate: int, seconds: int) -> tuple[int, float]:
    """按时刻表发；返回发出的个数与真正的速度。"""
    started, published = time.monotonic(), 0
    sending: set[asyncio.Task[object]] = set()
    while (elapsed := time.monotonic() - started) < seconds:
        for _ in range(int(elapsed * rate) - published):
            task = asyncio.create_task(connection.publish(DATA_IMPORT_COMPLETED, b"\xff not an event", message_id=str(uuid4())))
            sending.add(task)
            task.add_done_callback(sending.discard)
            published += 1
        await asyncio.sleep(_TICK_SECONDS)
    await asyncio.gather(*sending)
    return published, published / (time.monotonic() - started)
