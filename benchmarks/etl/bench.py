"""`pdm run bench etl`：首次装入、原样重跑、改了一成，各方交替。"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.etl import dlt_merge, floor, product, read_write_database, row_by_row
from benchmarks.etl.dataset import fill_database, set_changed
from benchmarks.measurement import Measurement, Side
from benchmarks.report import Bar, Spread, print_bars, write_results
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.testing.databases import cloned_database, template_database

SIZES = {"1k": 1_000, "100k": 100_000, "1M": 1_000_000}
PHASES = ("first load", "unchanged", "10 % changed")

_ROW_BY_ROW_LIMIT = 1_000
_WARM_UP_LIMIT = 100_000
"""到这个规模为止先不计时地做一遍：再大，预热的那点时间就看不出来了。"""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Contestant:
    """一方的一步：`peer` 的每次重复都很久，规模最大时只做一次。"""

    name: str
    load: Callable[[EtlSettings], None]
    peer: bool = False


@dataclass(frozen=True)
class Figures:
    """一个规模、一个阶段、一步的全部测量。"""

    size: str
    phase: str
    step: str
    seconds: Spread
    peak_rss_mib: float
    wal_mib: float


@click.command()
@click.option("--sizes", default=",".join(SIZES), show_default=True, help="Raw orders, comma separated: 1k, 100k, 1M.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1, 100))
def bench_etl(sizes: str, repeats: int) -> None:
    """The three ETLs against their in-database floor, read_database + write_database, dlt and row by row."""
    chosen = sizes.split(",")
    if unknown := [size for size in chosen if size not in SIZES]:
        raise click.UsageError(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, EmbeddedPostgres(Path(folder) / "postgres") as url:
        figures = [figure for size in chosen for figure in measure_size(url, size, repeats)]
        versions = {"postgresql": server_version(url)}
    print_figures(figures)
    bars = [bar for size in chosen for bar in bars_of(size, figures)]
    print_bars(bars)
    path = write_results("etl", bars, {"versions": versions, "figures": figures})
    click.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


def measure_size(server_url: str, size: str, repeats: int) -> list[Figures]:
    """在一个新的数据库里做完一个规模。"""
    rows = SIZES[size]
    with template_database(server_url) as template, cloned_database(server_url, template) as url:
        settings = EtlSettings(database_url=url)
        engine = build_engine(settings)
        fill_database(engine, rows)
        measured: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
        with processes() as sides:
            if rows <= _WARM_UP_LIMIT:
                run_phases(engine, settings, sides, contestants(rows), measured=None)
            for repeat in range(repeats):
                taking_part = [one for one in contestants(rows) if not (one.peer and rows > _WARM_UP_LIMIT and repeat)]
                click.echo(f"{size}: run {repeat + 1} of {repeats}", err=True)
                run_phases(engine, settings, sides, taking_part, measured=measured)
        engine.dispose()
    return [
        Figures(
            size=size,
            phase=phase,
            step=step,
            seconds=Spread.of([one.seconds for one in runs]),
            peak_rss_mib=max(one.peak_rss_bytes for one in runs) / _MEBIBYTE,
            wal_mib=Spread.of([one.wal_bytes for one in runs]).median / _MEBIBYTE,
        )
        for (phase, step), runs in measured.items()
    ]


def contestants(rows: int) -> list[Contestant]:
    """一轮里依次做的步骤；客户与商机读产品刚写下的订单，所以在它之后。"""
    steps = [
        Contestant("orders", load_product_orders),
        Contestant("orders floor", load_floor_orders),
        Contestant("orders read_database + write_database", load_read_write, peer=True),
        Contestant("orders dlt merge", load_dlt, peer=True),
        Contestant("customers", load_product_customers),
        Contestant("customers floor", load_floor_customers),
        Contestant("leads", load_product_leads),
        Contestant("leads floor", load_floor_leads),
    ]
    if rows <= _ROW_BY_ROW_LIMIT:
        steps.append(Contestant("all three row by row", load_row_by_row, peer=True))
    return steps


def run_phases(
    engine: sa.Engine,
    settings: EtlSettings,
    sides: dict[str, Side],
    steps: Sequence[Contestant],
    *,
    measured: dict[tuple[str, str], list[Measurement]] | None,
) -> None:
    """清空各方，再把三个阶段各做一遍；`measured` 是 None 时只热身。"""
    product.prepare(engine, settings)
    for module in (floor, read_write_database, dlt_merge, row_by_row):
        module.prepare(engine)
    for phase in PHASES:
        set_changed(engine, in_scope=phase == PHASES[-1])
        for step in steps:
            maintain(engine, "CHECKPOINT")
            result = sides[step.name].measure(engine, step.load, settings)
            if measured is not None:
                measured[phase, step.name].append(result)
        maintain(engine, "VACUUM ANALYZE")
    set_changed(engine, in_scope=False)


@contextmanager
def processes() -> Iterator[dict[str, Side]]:
    """每一步一个进程。"""
    sides: dict[str, Side] = defaultdict(Side)
    try:
        yield sides
    finally:
        for side in sides.values():
            side.stop()


def maintain(engine: sa.Engine, command: str) -> None:
    """平日里服务器自己做的事：上一步留下的脏页、死行与提示位，不算在下一步头上。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(command)


def server_version(url: str) -> str:
    engine = build_engine(EtlSettings(database_url=url))
    with engine.connect() as connection:
        version = str(connection.exec_driver_sql("SHOW server_version").scalar_one())
    engine.dispose()
    return version


# ---- 在各方自己的进程里 ------------------------------------------------------------


@lru_cache(maxsize=1)
def own_engine(settings: EtlSettings) -> sa.Engine:
    return build_engine(settings)


def load_product_orders(settings: EtlSettings) -> None:
    product.load_orders(own_engine(settings), settings)


def load_product_customers(settings: EtlSettings) -> None:
    product.load_customers(own_engine(settings), settings)


def load_product_leads(settings: EtlSettings) -> None:
    product.load_leads(own_engine(settings), settings)


def load_floor_orders(settings: EtlSettings) -> None:
    floor.load_orders(own_engine(settings))


def load_floor_customers(settings: EtlSettings) -> None:
    floor.load_customers(own_engine(settings))


def load_floor_leads(settings: EtlSettings) -> None:
    floor.load_leads(own_engine(settings))


def load_read_write(settings: EtlSettings) -> None:
    read_write_database.load_orders(own_engine(settings), settings)


def load_dlt(settings: EtlSettings) -> None:
    dlt_merge.load_orders(own_engine(settings), settings)


def load_row_by_row(settings: EtlSettings) -> None:
    row_by_row.load_all(own_engine(settings), settings)


# ---- 结果 ------------------------------------------------------------------------


def bars_of(size: str, figures: Sequence[Figures]) -> list[Bar]:
    """这个规模上的要求。"""
    found = {(figure.phase, figure.step): figure for figure in figures if figure.size == size}

    def seconds(step: str, phase: str = PHASES[0]) -> float:
        return found[phase, step].seconds.median

    if size == "1k":
        together = sum(seconds(step) for step in ("orders", "customers", "leads"))
        return [
            Bar(
                "1k, all three: row by row takes",
                seconds("all three row by row") / together,
                "times as long",
                40,
                "least",
            )
        ]
    if size == "100k":
        return []
    unchanged = found[PHASES[1], "orders"]
    steps = ("orders", "customers", "leads")
    peak = max(figure.peak_rss_mib for figure in found.values() if figure.step in steps)
    peer = "orders read_database + write_database"
    return [
        Bar("1M, orders: times its floor", seconds("orders") / seconds("orders floor"), "x", 1.8, "most"),
        Bar(f"1M, {peer} takes", seconds(peer) / seconds("orders"), "times as long", 4, "least"),
        Bar(
            "1M, orders unchanged: share of the first load",
            unchanged.seconds.median / seconds("orders"),
            "x",
            0.75,
            "most",
        ),
        Bar("1M, orders unchanged: WAL", unchanged.wal_mib, "MiB", 1, "most"),
        Bar("1M, peak RSS", peak, "MiB", 1000 * 1000 * 1000 / _MEBIBYTE, "most"),
        Bar("1M, customers: times its floor", seconds("customers") / seconds("customers floor"), "x", 2, "most"),
        Bar("1M, leads: times its floor", seconds("leads") / seconds("leads floor"), "x", 2, "most"),
    ]


def print_figures(figures: Sequence[Figures]) -> None:
    """每一步与产品的同一步相比。"""
    table = Table("raw orders", "phase", "step", "median s", "min - max", "x product", "peak RSS MiB", "WAL MiB")
    product_seconds = {(figure.size, figure.phase, figure.step): figure.seconds.median for figure in figures}
    for figure in figures:
        asset = figure.step.split()[0]
        base: Any = product_seconds.get((figure.size, figure.phase, asset))
        ratio = f"{figure.seconds.median / base:.2f}" if base else ""
        spread = f"{figure.seconds.min:.3f} - {figure.seconds.max:.3f}"
        table.add_row(
            figure.size,
            figure.phase,
            figure.step,
            f"{figure.seconds.median:.3f}",
            spread,
            ratio,
            f"{figure.peak_rss_mib:.0f}",
            f"{figure.wal_mib:.2f}",
        )
    Console(width=140).print(table)
