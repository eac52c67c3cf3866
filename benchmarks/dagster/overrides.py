"""`pdm run bench overrides`：盖掉 Dagster 存储的每个方法各省下多少；省不到 3 % 的不值得留。"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from uuid import uuid4

import click as cli
import sqlalchemy as sa
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage
from rich.console import Console
from rich.table import Table

from benchmarks.dagster.bench import FIRST, fill_days
from benchmarks.report import Bar, print_bars, write_results
from bridge.runs.lanes import LANE_TAG
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings, get_bridge_settings
from bridge.stack.local import Stack
from bridge.warm_dagster.code_location_name import JOB_NAME
from bridge.warm_dagster.lean_events import LeanEventLogStorage
from bridge.warm_dagster.lean_runs import LeanRunStorage
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData

_ALL = "all overrides"
_WARM_UP = 3
_NEEDED_PERCENT = 3.0
_FOR_CORRECTNESS = {"_connect", "index_connection"}
"""攒着写的另一半：本进程读得到自己攒着的；检查的记录再写一次也不会重。"""


@dataclass(frozen=True)
class Cost:
    """一个运行的中位数：语句数，本进程的 CPU。"""

    statements: float
    cpu_ms: float


@cli.command()
@cli.option("--runs", default=100, show_default=True, type=cli.IntRange(5, 300), help="Runs of each kind, interleaved.")
def bench_overrides(runs: int) -> None:
    """What each override of Dagster's storage saves: statements and CPU of a run without it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(Path(folder), settings=EtlSettings(database_url=""), bridge_settings=BridgeSettings(nats_url=""))
        with stack as addresses:
            engine = build_engine(EtlSettings(database_url=addresses.database_url))
            RawData(engine)
            fill_days(engine, runs)
            engine.dispose()
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                costs = process.submit(measure_costs, {**os.environ, **addresses.environment()}, runs).result()
    full = costs.pop(_ALL)
    table = Table("a three-asset run of one day without", "statements", "CPU ms")
    table.add_row("(nothing is missing)", f"{full.statements:g}", f"{full.cpu_ms:.1f}")
    for name, cost in costs.items():
        table.add_row(name, f"{cost.statements:g}", f"{cost.cpu_ms:.1f}")
    Console().print(table)
    bars = [
        Bar(f"{name} saves", _saved_percent(full, cost), "%", _NEEDED_PERCENT, "least")
        for name, cost in costs.items()
        if name not in _FOR_CORRECTNESS
    ]
    print_bars(bars)
    cli.echo(f"written to {write_results('overrides', bars, {'figures': {_ALL: full, **costs}})}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


def overrides() -> Mapping[str, type]:
    """方法名与它所在的类：原样的存储里也有的，都在。"""
    pairs = (LeanRunStorage, PostgresRunStorage), (LeanEventLogStorage, PostgresEventLogStorage)
    return {
        name: lean
        for lean, stock in pairs
        for name, own in vars(lean).items()
        if hasattr(stock, name) and _is_method(own) and name != "__init__"
    }


def _is_method(own: object) -> bool:
    return inspect.isfunction(own) or isinstance(own, property)


def measure_costs(environment: Mapping[str, str], runs: int) -> dict[str, Cost]:
    """每一轮是一天，各做一个运行：什么也不缺的、缺了一样的；次序每轮往后挪一位。"""
    os.environ.update(environment)
    worker = RunWorker.load(get_bridge_settings())
    kinds = [_ALL, *overrides()]
    taken: dict[str, list[Cost]] = {kind: [] for kind in kinds}
    for number in range(runs + _WARM_UP):
        shift = number % len(kinds)
        for kind in kinds[shift:] + kinds[:shift]:
            with _without(kind):
                cost = _measure_run(worker, FIRST + timedelta(days=number))
            if number >= _WARM_UP:
                taken[kind].append(cost)
    return {
        kind: Cost(
            statistics.median(cost.statements for cost in costs), statistics.median(cost.cpu_ms for cost in costs)
        )
        for kind, costs in taken.items()
    }


def _measure_run(worker: RunWorker, day: date) -> Cost:
    with _counted_statements(worker) as counted:
        started = time.process_time()
        run = worker.location.create_run(
            worker.instance,
            job_name=JOB_NAME,
            run_id=str(uuid4()),
            assets=worker.location.graph.names,
            days=DayRange(day, day),
            tags={LANE_TAG: "event"},
        )
        held = worker.take(run.run_id)
        if held is None or not worker.execute(held).succeeded:
            raise RuntimeError(f"run {run.run_id} of {day} did not succeed")
        cpu_ms = (time.process_time() - started) * 1000
    return Cost(statements=len(counted), cpu_ms=cpu_ms)


@contextmanager
def _without(override: str) -> Iterator[None]:
    """这一个方法退回原样的。"""
    lean = overrides().get(override)
    if lean is None:
        yield
        return
    kept = vars(lean)[override]
    delattr(lean, override)
    try:
        yield
    finally:
        setattr(lean, override, kept)


@contextmanager
def _counted_statements(worker: RunWorker) -> Iterator[list[str]]:
    """Dagster 的连接池里执行的。"""
    storage = worker.instance.run_storage
    assert isinstance(storage, LeanRunStorage)  # noqa: S101  # open_instance 换上的
    statements: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    sa.event.listen(storage._engine, "before_cursor_execute", count)
    try:
        yield statements
    finally:
        sa.event.remove(storage._engine, "before_cursor_execute", count)


def _saved_percent(full: Cost, without: Cost) -> float:
    """两样里省得多的一样。"""
    return max(1 - full.statements / without.statements, 1 - full.cpu_ms / without.cpu_ms) * 100
