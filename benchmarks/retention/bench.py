"""`pdm run bench retention`：一年的导入，每过一天清一次，像夜里那样；每张表与流在第几天有多大，网页问的还对不对。"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.dagster.clicks import ask
from benchmarks.own_stack import own_addresses
from benchmarks.raw_imports import add_imports, new_order
from benchmarks.report import Bar, Spread, print_bars, write_results
from benchmarks.retention.days import add_day, begin, publish_day, read_model, table_sizes, vacuum
from bridge.events.envelope import DataImportCompleted
from bridge.events.publish import publish_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import delete_messages_before
from bridge.jetstream.streams import stream_state
from bridge.nats_names import EVENTS_STREAM
from bridge.runs.retention import Pruning, prune
from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.settings import EtlSettings
from etl_assets.reports.progress import import_progress
from etl_assets.testing.raw_data import RawData

_DAYS_OF_EVENTS = 30
"""EVENTS 自己的期限；模拟的一天里由我们按序号删去，服务器自己是按时刻。"""
_MIB = 1 << 20
_A_ROW_PER_DAY = {"etl.ledger", "etl.locks"}
"""一天几行、不随导入多少而长的；别的表在期限之后不该再长。"""
_LEAST_BYTES = 256 * 1024
"""再小的表，多一页少一页都是几成。"""


@cli.command()
@cli.option("--days", default=365, show_default=True, type=cli.IntRange(2, 3_650), help="Simulated days.")
@cli.option(
    "--imports", default=100, show_default=True, type=cli.IntRange(10, 10_000), help="Imports (and runs) a day."
)
def bench_retention(days: int, imports: int) -> None:
    """A year of imports, pruned night by night: sizes that stay, and Dagster's pages that stay right."""
    with own_addresses() as addresses:
        year = asyncio.run(_Year(addresses, days, imports).live())
    print_sizes(year["sizes"])
    bars = list(bars_of(year))
    print_bars(bars)
    path = write_results("retention", bars, {"figures": year | {"imports_a_day": imports}})
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


class _Year:
    """一套安装的一年。"""

    def __init__(self, addresses: StackAddresses, days: int, imports: int) -> None:
        self._settings = EtlSettings(database_url=addresses.database_url)
        self._bridge_settings = BridgeSettings(nats_url=addresses.nats_url)
        self._engine = build_engine(self._settings)
        self._addresses, self._days, self._imports = addresses, days, imports
        self._last = datetime.now(UTC).date()

    async def live(self) -> dict[str, Any]:
        sizes: dict[int, dict[str, tuple[int, int]]] = {}
        seconds: list[float] = []
        following: list[int] = []
        async with JetStreamConnection(self._bridge_settings, name="benchmark") as connection:
            model = await self._make_one_run(connection)
            first = self._last - timedelta(days=self._days)
            await asyncio.to_thread(begin, self._engine, first - timedelta(days=1))
            # 工人自己的那一次不来插手：它照真的钟看，模拟的日子对它都太老
            self._postpone_own()
            for number in range(1, self._days + 1):
                today = first + timedelta(days=number)
                imports = await asyncio.to_thread(add_day, self._engine, model, today, self._imports)
                following.append(await publish_day(connection, model, imports))
                if number > _DAYS_OF_EVENTS:
                    await delete_messages_before(connection, EVENTS_STREAM, following[number - _DAYS_OF_EVENTS - 1])
                seconds.append(await self._prune(connection, self._days - number))
                await asyncio.to_thread(vacuum, self._engine)
                if number in self._shown_days():
                    state = await stream_state(connection, EVENTS_STREAM)
                    sizes[number] = await asyncio.to_thread(table_sizes, self._engine)
                    sizes[number][f"stream {EVENTS_STREAM}"] = (state.bytes, state.messages) if state else (0, 0)
                    cli.echo(f"day {number}: pruned in {seconds[-1]:.2f} s", err=True)
        return {"sizes": sizes, "prune_seconds": Spread.of(seconds), "pages": self._look_at_pages()}

    def _shown_days(self) -> set[int]:
        return {30, 90, 180, 270, self._days}

    async def _make_one_run(self, connection: JetStreamConnection) -> Any:
        RawData(self._engine)
        day = self._last - timedelta(days=self._days + 100)
        (import_id,) = add_imports(self._engine, [new_order(day)])
        event = DataImportCompleted(import_id=import_id, event_id=import_id, occurred_at=datetime.now(UTC))
        await publish_event(DATA_IMPORT_COMPLETED, event, settings=self._bridge_settings)
        while True:
            progress = transact(self._engine, import_progress, self._settings, import_id)
            if progress.handled and progress.done == progress.days:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(3)  # 完成事件在旁边发
        return await read_model(self._engine, connection, import_id, day)

    def _postpone_own(self) -> None:
        with self._engine.begin() as database:
            database.exec_driver_sql("UPDATE etl.retention SET finished_at = '9999-01-01'")

    async def _prune(self, connection: JetStreamConnection, days_ago: int) -> float:
        """清到模拟的今天：真的钟比它晚 days_ago 天，保留期就长这么多。"""
        settings = self._settings.model_copy(
            update={"retention_ledger_days": self._settings.retention_ledger_days + days_ago}
        )
        bridge = self._bridge_settings
        bridge = bridge.model_copy(update={"retention_runs_days": bridge.retention_runs_days + days_ago})
        started_at = time.perf_counter()
        removed = await prune(Pruning(self._engine, settings, bridge, connection, self._addresses.dagster_postgres_url))
        if removed is None:
            raise RuntimeError("somebody else is pruning")
        elapsed = time.perf_counter() - started_at
        self._postpone_own()
        return elapsed

    def _look_at_pages(self) -> dict[str, int]:
        """网页的三问：每个分区最新的物化、哪些分区做过、最近的运行。数出与该是的不同的。"""
        with self._engine.connect() as database:
            expected = {
                str(row.day): row.run_id for row in database.execute(sa.text("SELECT day, run_id FROM expected"))
            }
            newest = (
                database.exec_driver_sql("SELECT run_id FROM dagster.runs ORDER BY id DESC LIMIT 100").scalars().all()
            )
        url, wrong = self._addresses.ui_url, dict.fromkeys(("materializations", "partitions", "runs"), 0)
        for asset in ("orders", "customers", "leads"):
            node = ask(url, _NODE, key={"path": [asset]}, days=sorted(expected))["assetNodeOrError"]
            shown = {found["partition"]: found["runId"] for found in node["latestMaterializationByPartition"] if found}
            wrong["materializations"] += len(expected.items() ^ shown.items())
            ranges = node["assetPartitionStatuses"]["ranges"]
            made = {
                str(date.fromisoformat(each["startKey"]) + timedelta(days=offset))
                for each in ranges
                for offset in range(
                    (date.fromisoformat(each["endKey"]) - date.fromisoformat(each["startKey"])).days + 1
                )
            }
            wrong["partitions"] += len(expected.keys() - made)
        shown_runs = [run["runId"] for run in ask(url, _RUNS, limit=100)["runsOrError"]["results"]]
        wrong["runs"] = sum(one != other for one, other in zip(shown_runs, newest, strict=True))
        oldest = min(expected)
        page = ask(url, _RUN, id=expected[oldest])["runOrError"]
        wrong["runs"] += page.get("status") != "SUCCESS"
        return {"partitions_looked_at": len(expected), **{f"wrong_{name}": number for name, number in wrong.items()}}


_NODE = """query($key: AssetKeyInput!, $days: [String!]) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
    latestMaterializationByPartition(partitions: $days) { partition runId }
    assetPartitionStatuses { ... on TimePartitionStatuses { ranges { startKey endKey status } } } } } }"""
_RUNS = "query($limit: Int) { runsOrError(limit: $limit) { ... on Runs { results { runId status } } } }"
_RUN = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status assetMaterializations { partition } } } }"


def bars_of(year: dict[str, Any]) -> Iterator[Bar]:
    """行数不再长；期限之后的一天多占的，是它写下的几成：每个业务日留着几行，它们所在的索引页也就留着。"""
    sizes, pages = year["sizes"], year["pages"]
    first, last = min(sizes), max(sizes)
    middle = min(sizes, key=lambda number: abs(number - last / 2))
    for name, (size, rows) in sorted(sizes[last].items()):
        before = sizes[middle].get(name, (0, 0))[1]
        if size >= _LEAST_BYTES and name not in _A_ROW_PER_DAY and before:
            yield Bar(f"{name}: rows on day {last} over day {middle}", rows / before, "times", 1.1, "most")
    totals = {number: sum(size for size, _ in tables.values()) for number, tables in sizes.items()}
    stays = (totals[last] - totals[middle]) / max(last - middle, 1)
    yield Bar(
        f"what a day adds after day {middle}, of what it writes", stays / (totals[first] / first), "of it", 0.05, "most"
    )
    for name in ("materializations", "partitions", "runs"):
        yield Bar(f"Dagster's pages: wrong {name}", pages[f"wrong_{name}"], name, 0, "most")


def print_sizes(sizes: dict[int, dict[str, tuple[int, int]]]) -> None:
    shown = sorted(sizes)
    table = Table("MiB (rows)", *(f"day {number}" for number in shown))
    names = sorted(sizes[shown[-1]], key=lambda name: -sizes[shown[-1]][name][0])
    for name in names:
        cells = [sizes[number].get(name, (0, 0)) for number in shown]
        if cells[-1][0] >= _LEAST_BYTES:
            table.add_row(name, *(f"{size / _MIB:.1f} ({rows:,})" for size, rows in cells))
    totals = [sum(size for size, _ in sizes[number].values()) / _MIB for number in shown]
    table.add_row("all of them", *(f"{total:.1f}" for total in totals))
    Console(width=160).print(table)
