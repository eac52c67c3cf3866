"""`pdm run bench import`：`etl import` 读一个大 CSV 进 raw_orders，与 PostgreSQL 自己 COPY 同一个文件，交替。"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

import click
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import Measurement, Side
from benchmarks.report import Bar, Spread, print_bars, write_results
from bridge.imports.loading import import_file
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.services.copy_out import driver_of
from etl_assets.testing.databases import initialize_database

_MEBIBYTE = 1 << 20
_MOST_MIB = 500
_MOST_TIMES = 3.0
_CHUNK_BYTES = 1 << 20
_COLUMNS = "order_id, shop, customer_name, order_type, order_status, amount, quantity, ordered_at"


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(1_000, 50_000_000), help="Orders.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1, 50), help="Times, both sides in turn.")
def bench_import(rows: int, repeats: int) -> None:
    """Import one CSV file into PostgreSQL: time beside a bare COPY of the same file, peak memory."""
    product: list[Measurement] = []
    floor: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder, "server")) as url:
        settings, path = EtlSettings(database_url=url), Path(folder, "orders.csv")
        engine = build_engine(settings)
        initialize_database(engine)
        write_orders(path, rows)
        for repeat in range(repeats):
            click.echo(f"run {repeat + 1} of {repeats}", err=True)
            product.append(measure(engine, import_orders, settings, path))
            floor.append(measure(engine, copy_orders, settings, path))
        engine.dispose()
        size = path.stat().st_size
    times = Spread.of([here.seconds / there.seconds for here, there in zip(product, floor, strict=True)])
    table = Table("side", "seconds (median)", "peak MiB", title=f"{rows:,} orders, {size / _MEBIBYTE:.0f} MiB")
    for name, runs in (("etl import", product), ("COPY", floor)):
        seconds = Spread.of([one.seconds for one in runs])
        table.add_row(name, f"{seconds.median:.1f}", f"{peak_mib(runs):.0f}")
    Console().print(table)
    bars = [
        Bar("peak memory of etl import", peak_mib(product), "MiB", _MOST_MIB, "most"),
        Bar("etl import beside COPY", times.median, "times", _MOST_TIMES, "most"),
    ]
    print_bars(bars)
    figures = {"product": [asdict(one) for one in product], "floor": [asdict(one) for one in floor]}
    click.echo(f"written to {write_results('import', bars, {'rows': rows, 'bytes': size, **figures})}")
    sys.exit(not all(bar.ok for bar in bars))


def measure(
    engine: sa.Engine, load: Callable[[EtlSettings, Path], None], settings: EtlSettings, path: Path
) -> Measurement:
    """每次都是新的进程，像命令那样；装进空的表。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("TRUNCATE raw_orders, import_tasks, etl.imported_files CASCADE")
        connection.exec_driver_sql("CHECKPOINT")
    side = Side()
    try:
        return side.measure(engine, load, settings, path)
    finally:
        side.stop()


def peak_mib(runs: list[Measurement]) -> float:
    return max(one.peak_rss_bytes for one in runs) / _MEBIBYTE


def write_orders(path: Path, rows: int) -> None:
    draw = random.Random(rows)  # noqa: S311  # 造数据
    statuses, types = ("已付款", "已发货", "已完成", "已取消"), ("打样", "大货订单", "样品")
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{_COLUMNS}\n")
        for number in range(rows):
            amount, second = draw.randrange(1, 9_999_999) / 100, draw.randrange(180 * 86_400)
            file.write(
                f"T{10**12 + number},旗舰店,客户{draw.randrange(rows // 4)},{draw.choice(types)},{draw.choice(statuses)},"
                f"{amount:.2f},{draw.randrange(1, 9)},{datetime(2026, 1, 1) + timedelta(seconds=second)}\n"  # noqa: DTZ001
            )


# ---- 在各方自己的进程里 ------------------------------------------------------------


def import_orders(settings: EtlSettings, path: Path) -> None:
    import_file(build_engine(settings), path, settings=settings, choose_profile=True, create_shops=True)


def copy_orders(settings: EtlSettings, path: Path) -> None:
    """同一个文件原样 COPY 进同一张表：不看、不换、不查。"""
    import_id = uuid4()
    statement = f"COPY raw_orders ({_COLUMNS}) FROM STDIN (FORMAT csv, HEADER)"
    with build_engine(settings).begin() as connection, driver_of(connection).cursor() as cursor:
        connection.execute(
            sa.insert(import_tasks).values(import_id=import_id, status="completed", completed_at=sa.func.now())
        )
        # 每行还要有导入的 id：由缺省值给
        connection.exec_driver_sql(f"ALTER TABLE raw_orders ALTER import_id SET DEFAULT '{import_id}'")
        with cursor.copy(statement.encode()) as copy, path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                copy.write(chunk)
