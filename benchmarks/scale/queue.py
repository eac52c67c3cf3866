"""事件先在 EVENTS 里排着，再起监听器：队伍有多长，它一秒照样记下几个；最后一个进台账以后，多久全部做完。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import click

from benchmarks.burst.bench import count_due, publish_imports, wait_until
from benchmarks.history import LAST_DAY
from benchmarks.raw_imports import add_imports, new_order
from benchmarks.scale.parts import Site, running_part, running_site
from benchmarks.scale.workers import HISTORY
from benchmarks.verification import count_wrong
from bridge.events.streams import consumer_name
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import consumer_info, stream_state
from bridge.nats_names import EVENTS_STREAM

LENGTHS = (1_000, 10_000, 100_000)
LONGEST = 1_000_000
_DAYS = 30
_AT_A_TIME = 10_000
_SLOWEST_PER_SECOND = 50


@dataclass(frozen=True)
class Drained:
    """一条队伍：监听器就绪以后多久空了，又过多久全部日子做完；stream_bytes 是一个事件在 EVENTS 里占的。"""

    events: int
    handled_seconds: float
    done_seconds: float
    stream_bytes: float

    @property
    def handled_per_second(self) -> float:
        return self.events / self.handled_seconds


def measure_queue(lengths: Sequence[int]) -> tuple[list[Drained], dict[str, int]]:
    """短的先来；连同最后表里有几行不对。"""
    with running_site(HISTORY) as site, running_part("worker", "--processes", "2", environment=site.environment):
        _drain(site, 100)  # 工人热了
        return [_drain(site, length) for length in lengths], count_wrong(site.engine)


def _drain(site: Site, events: int) -> Drained:
    patience = 120 + events / _SLOWEST_PER_SECOND
    _fill(site, events)
    with running_part("listen", environment=site.environment) as listener:
        wait_until(time.perf_counter(), listener.is_ready)
        started = time.perf_counter()
        handled_seconds = asyncio.run(_until_empty(site, started, patience))
        wait_until(started, lambda: not count_due(site.engine), timeout_seconds=patience)
        done_seconds = time.perf_counter() - started - handled_seconds
    drained = Drained(events, handled_seconds, done_seconds, asyncio.run(_stream_bytes(site)))
    click.echo(f"{events:,} events: {drained.handled_per_second:,.0f}/s, done {done_seconds:.1f} s later", err=True)
    return drained


def _fill(site: Site, events: int) -> None:
    every = range(events)
    for first in range(0, events, _AT_A_TIME):
        orders = [new_order(LAST_DAY - timedelta(days=n % _DAYS)) for n in every[first : first + _AT_A_TIME]]
        asyncio.run(publish_imports(site.bridge_settings, add_imports(site.engine, orders)))


async def _until_empty(site: Site, started: float, patience: float) -> float:
    """到消费者没有一个没投出去、没确认的事件。"""
    name = consumer_name(site.bridge_settings, DATA_IMPORT_COMPLETED)
    async with JetStreamConnection(site.bridge_settings, name="benchmark") as connection, asyncio.timeout(patience):
        while (info := await consumer_info(connection, EVENTS_STREAM, name)) is None or (
            info.num_pending or info.num_ack_pending
        ):
            await asyncio.sleep(0.05)
    return time.perf_counter() - started


async def _stream_bytes(site: Site) -> float:
    async with JetStreamConnection(site.bridge_settings, name="benchmark") as connection:
        state = await stream_state(connection, EVENTS_STREAM)
    if state is None:
        raise RuntimeError("EVENTS has gone")
    return state.bytes / state.messages
