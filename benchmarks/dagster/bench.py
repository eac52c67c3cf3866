"""`pdm run bench dagster`：库里已有一百万个订单；点击到成功，热的一路与原样的 Dagster 交替；一个工人进程一秒做几个运行。"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from uuid import uuid4

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.dagster.clicks import click
from benchmarks.dagster.run_rate import RunRate, measure_run_rate
from benchmarks.dagster.stock import stock_dagster
from benchmarks.history import fill_ordinary
from benchmarks.report import Bar, Spread, print_bars, write_results
from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME

FIRST = date(2010, 1, 1)
"""早于任何历史：这些天只有这里放的订单，也不推后最新的业务日。"""
ORDERS_PER_DAY = 20
COMPLETED_AT = datetime(2026, 1, 1, tzinfo=UTC)
_WARM_UP = 3


@cli.command()
@cli.option(
    "--clicks", default=15, show_default=True, type=cli.IntRange(3, 1000), help="Clicks on each side, interleaved."
)
@cli.option(
    "--runs", default=100, show_default=True, type=cli.IntRange(10, 100_000), help="Runs of the worker process."
)
def bench_dagster(clicks: int, runs: int) -> None:
    """UI click to SUCCESS against stock Dagster, and runs per second of one worker process."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(
            Path(folder) / "warm",
            settings=EtlSettings(database_url=""),
            bridge_settings=BridgeSettings(nats_url=""),
        )
        with stack as addresses:
            settings = EtlSettings(database_url=addresses.database_url)
            engine = build_engine(settings)
            fill_ordinary(engine, settings)
            fill_days(engine, runs)
            engine.dispose()
            environment = {**os.environ, **addresses.environment(), "DAGSTER_DISABLE_TELEMETRY": "1"}
            warm, stock = measure_clicks(Path(folder), addresses, environment, clicks)
            rate = in_own_process(environment, runs)
    print_figures(warm, stock, rate)
    bars = [
        Bar("UI click to SUCCESS, warm, median", warm.median, "s", 0.5, "most"),
        Bar("UI click to SUCCESS: stock Dagster takes", stock.median / warm.median, "times as long", 12, "least"),
        Bar("runs per second of one worker process", rate.runs_per_second, "runs/s", 8, "least"),
    ]
    print_bars(bars)
    path = write_results("dagster", bars, {"figures": {"warm_click": warm, "stock_click": stock, "run_rate": rate}})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


def measure_clicks(
    folder: Path, addresses: StackAddresses, environment: dict[str, str], clicks: int
) -> tuple[Spread, Spread]:
    """每一轮各点一次；两边的网页都热过。"""
    seconds: dict[str, list[float]] = {"warm": [], "stock": []}
    with stock_dagster(folder / "stock", addresses, environment) as stock_url:
        for number in range(clicks + 1):
            cli.echo(f"click {number} of {clicks}", err=True)
            for side, url in (("warm", addresses.ui_url), ("stock", stock_url)):
                elapsed = click(url, (FIRST + timedelta(days=number)).isoformat())
                if number:
                    seconds[side].append(elapsed)
    return Spread.of(seconds["warm"]), Spread.of(seconds["stock"])


def in_own_process(environment: dict[str, str], runs: int) -> RunRate:
    days = [FIRST + timedelta(days=offset) for offset in range(runs + _WARM_UP)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_run_rate, environment, days, _WARM_UP).result()


def fill_days(engine: sa.Engine, days: int) -> None:
    """每天二十个订单，没有事件：只有点击与这个基准要做它们。

    客户都是历史里的（有的话），一人连着三天各下一单：分区要一样小，不能因为同一些客户的历史越跑越长。
    """
    import_id = uuid4()
    rows = [
        {
            "import_id": import_id,
            "shop": SAMPLE_SHOP_NAME,
            "order_id": f"B-{day}-{number}",
            "customer_name": f"客户{day // 3 * ORDERS_PER_DAY + number}",
            "order_status": "paid",
            "amount": "10.00",
            "ordered_at": datetime.combine(FIRST + timedelta(days=day), time(4), UTC),
        }
        for day in range(days + _WARM_UP)
        for number in range(ORDERS_PER_DAY)
    ]
    with engine.begin() as connection:
        # 早就完成了的：不然过一分钟，监听器就当它没有人宣布，自己要求这些天
        connection.execute(
            sa.insert(import_tasks).values(import_id=import_id, status="completed", completed_at=COMPLETED_AT)
        )
        connection.execute(sa.insert(raw_orders), rows)
        connection.execute(sa.text("ANALYZE raw_orders, import_tasks"))  # 过一分钟 autovacuum 也会做


def print_figures(warm: Spread, stock: Spread, rate: RunRate) -> None:
    table = Table("UI click to SUCCESS, one day of three assets", "median s", "min - max", "clicks")
    for name, spread in (("warm", warm), ("stock Dagster", stock)):
        table.add_row(name, f"{spread.median:.3f}", f"{spread.min:.3f} - {spread.max:.3f}", str(spread.runs))
    Console().print(table)
    parts = Table("one worker process, three-asset runs of one day", "ms per run")
    dagster_ms = rate.execute_ms - rate.etl_ms
    for name, value in (
        ("create the run", rate.create_ms),
        ("take it: lease, status", rate.take_ms),
        ("execute: the three ETLs", rate.etl_ms),
        ("execute: Dagster's steps, events and checks, the end of the run", dagster_ms),
    ):
        parts.add_row(name, f"{value:.1f}")
    Console().print(parts)
