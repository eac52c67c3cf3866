"""`pdm run bench scale`：工人与主机的个数、台账里的天数、排着队的事件，各变十倍百倍，快慢变多少。"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import click as cli
from rich.console import Console
from rich.table import Table

from benchmarks.growth.bench import print_figures as print_stages
from benchmarks.report import Bar, print_bars, write_results
from benchmarks.scale.partitions import CASES, Partitions, measure_partitions
from benchmarks.scale.queue import LENGTHS, LONGEST, Drained, measure_queue
from benchmarks.scale.replicas import measure_replicas
from benchmarks.scale.workers import CREWS, LOADS, ROUND_TRIP_SECONDS, Pace, measure_workers

_PARTS = ("workers", "partitions", "queue", "replicas")
_STEADY_QUEUE = 10_000
"""更短的队伍，量的多半是监听器头一批。"""


@cli.command()
@cli.option(
    "--seconds",
    default=45.0,
    show_default=True,
    type=cli.FloatRange(30, 600),
    help="How long each group of workers is watched, after its first runs.",
)
@cli.option(
    "--rounds",
    default=2,
    show_default=True,
    type=cli.IntRange(1, 20),
    help="How often each group of workers is watched.",
)
@cli.option("--full", is_flag=True, help=f"Also {LONGEST:,} events that wait.")
@cli.option("--only", type=cli.Choice(_PARTS), multiple=True, help="This part only.")
def bench_scale(seconds: float, rounds: int, *, full: bool, only: Sequence[str]) -> None:
    """Workers and hosts, days in the ledger, events that wait: how does the pace change?"""
    wanted = only or _PARTS
    bars: list[Bar] = []
    figures: dict[str, object] = {}
    if "workers" in wanted:
        paces = measure_workers(seconds, rounds)
        print_paces(paces)
        bars += bars_of_workers(paces)
        figures["workers"] = paces
    if "partitions" in wanted:
        partitions = measure_partitions()
        print_partitions(partitions)
        bars += bars_of_partitions(partitions)
        spreads = {case.title: partitions.measured[case.key].spreads() for case in CASES}
        figures |= {"partitions": spreads, "claims": partitions.claims}
    if "queue" in wanted:
        queues, wrong = measure_queue([*LENGTHS, LONGEST] if full else LENGTHS)
        print_queues(queues)
        bars += bars_of_queues(queues, wrong)
        figures |= {"queue": queues, "wrong": wrong}
    if "replicas" in wanted:
        rates = measure_replicas()
        print_replicas(rates)
        figures["replicas"] = rates
    if bars:
        print_bars(bars)
    path = write_results("scale", bars, {"figures": figures})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


def rate_of(paces: Sequence[Pace], load: str, crew: str) -> float:
    return statistics.median(pace.runs_per_second for pace in paces if (pace.load, pace.crew) == (load, crew))


def bars_of_workers(paces: Sequence[Pace]) -> Iterator[Bar]:
    alone, *several, eight, apart = CREWS
    for load in LOADS:
        for crew in (*several, eight):
            speed_up = rate_of(paces, load.name, crew.name) / rate_of(paces, load.name, alone.name)
            yield Bar(f"{load.name}: {crew.name} workers", speed_up / crew.workers, "of linear", 0.9, "least")
        hosts = rate_of(paces, load.name, apart.name) / rate_of(paces, load.name, eight.name)
        yield Bar(f"{load.name}: {apart.name} on two hosts", hosts, f"of {eight.name} on one", 0.9, "least")


def bars_of_partitions(partitions: Partitions) -> Iterator[Bar]:
    for stage, name in (("event", "publish to SUCCESS"), ("click", "click to SUCCESS")):
        yield Bar(f"{CASES[-1].title}: {name}", partitions.times(stage), f"times {CASES[0].title}", 1.3, "most")


def bars_of_queues(queues: Sequence[Drained], wrong: dict[str, int]) -> Iterator[Bar]:
    steady = next(queue for queue in queues if queue.events == _STEADY_QUEUE)
    for queue in queues:
        if queue.events > _STEADY_QUEUE:
            ratio = queue.handled_per_second / steady.handled_per_second
            name = f"{queue.events:,} events wait: into the ledger"
            yield Bar(name, ratio, f"of the rate of {_STEADY_QUEUE:,}", 0.8, "least")
    yield Bar("rows that one statement over all raw rows finds wrong", sum(wrong.values()), "rows", 0, "most")


def print_paces(paces: Sequence[Pace]) -> None:
    table = Table(
        f"workers {ROUND_TRIP_SECONDS * 1000:g} ms from the servers",
        *("runs/s", "of linear", "cores idle", "waiting for locks", "runs"),
    )
    for load in LOADS:
        alone = rate_of(paces, load.name, CREWS[0].name)
        for crew in CREWS:
            rate = rate_of(paces, load.name, crew.name)
            own = [pace for pace in paces if (pace.load, pace.crew) == (load.name, crew.name)]
            idle = statistics.median(pace.idle_share for pace in own)
            locked = statistics.median(pace.locked_share for pace in own)
            runs = sum(pace.runs for pace in own)
            linear = rate / alone / crew.workers
            table.add_row(
                f"{load.name}: {crew.name}",
                *(f"{rate:.2f}", f"{linear:.2f}", f"{idle:.0%}", f"{locked:.1%}", str(runs)),
            )
    Console(width=200).print(table)


def print_partitions(partitions: Partitions) -> None:
    print_stages(CASES, dict(partitions.measured))
    table = Table(f"one claim, {CASES[-1].title} in the ledger", "median ms (min - max)")
    for due, spread in partitions.claims.items():
        table.add_row(f"{due:,} of them due", f"{spread.median:.1f} ({spread.min:.1f} - {spread.max:.1f})")
    Console().print(table)


def print_queues(queues: Sequence[Drained]) -> None:
    table = Table("events that wait", "into the ledger, events/s", "all days done, s later", "bytes of one in EVENTS")
    for queue in queues:
        table.add_row(
            f"{queue.events:,}",
            f"{queue.handled_per_second:,.0f}",
            f"{queue.done_seconds:.1f}",
            f"{queue.stream_bytes:.0f}",
        )
    Console().print(table)


def print_replicas(rates: Mapping[str, float]) -> None:
    table = Table("events stored", "events/s")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}")
    Console().print(table)
