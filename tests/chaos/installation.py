"""一套真的安装：数据库、NATS、一个监听器、一个工人；死了的由 keep 补上，像看护者那样。"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import nats
import sqlalchemy as sa

from bridge.events import DataImportCompleted, Event
from bridge.events.publish import publish_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED, etl_completed
from bridge.nats_names import EVENTS_STREAM
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)
from etl_assets.core.database_sync import build_engine
from etl_assets.core.etl_tables import leases, ledger, outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.definitions import graph
from etl_assets.reports.progress import import_progress

REPOSITORY = Path(__file__).parents[2]
ROLES = ("listen", "worker")


@dataclass
class Installation:
    """commands：角色 → 怎样启动它。"""

    engine: sa.Engine
    settings: EtlSettings
    nats_url: str
    environment: dict[str, str]
    folder: Path
    commands: dict[str, Sequence[str]]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log(self, role: str) -> str:
        path = self.folder / f"{role}.log"
        return path.read_text() if path.exists() else ""

    def keep(self) -> None:
        for role, command in self.commands.items():
            process = self.processes.get(role)
            if process is None or process.poll() is not None:
                with (self.folder / f"{role}.log").open("ab") as log:
                    self.processes[role] = subprocess.Popen(
                        command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log
                    )

    def eventually(self, condition: Callable[[], object], what: str, *, timeout_seconds: float = 90) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            self.keep()
            assert time.monotonic() < deadline, f"{what}\n" + "".join(self.log(role)[-4000:] for role in self.commands)
            time.sleep(0.05)

    def announce(self, import_id: UUID) -> None:
        self.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))

    def publish(self, subject: str, event: Event) -> None:
        asyncio.run(publish_event(subject, event, settings=BridgeSettings(nats_url=self.nats_url)))

    def is_done(self, import_id: UUID) -> bool:
        """数据在表里，别的也都做完了。"""
        with self.engine.connect() as connection:
            progress = import_progress(connection, self.settings, import_id)
        return progress.handled and progress.done == progress.days and self.is_quiet()

    def is_quiet(self) -> bool:
        """没有哪一天到期，租约放了，完成事件都发出去了，每个运行都有结局：失去了租约的那个，晚一点才写下它的。"""
        due = sa.select(sa.func.count()).select_from(ledger).where(ledger.c.requested > ledger.c.materialized)
        left = [due, *(sa.select(sa.func.count()).select_from(table) for table in (leases, outbox))]
        with self.engine.connect() as connection:
            return [connection.scalar(each) for each in left] == [0, 0, 0] and not self.unfinished_runs()

    def completions(self, day: str) -> dict[str, int]:
        """流里成功的完成事件：资产 → 这一天的个数。"""
        events = asyncio.run(self._stored_events())
        of_day = [found for found, event in events if event["status"] == "success" and day in event["partitions"]]
        return {asset: of_day.count(etl_completed(asset)) for asset in graph.names}

    async def _stored_events(self) -> list[tuple[str | None, dict[str, object]]]:
        client = await nats.connect(self.nats_url)
        try:
            stream = client.jetstream()
            last = (await stream.stream_info(EVENTS_STREAM)).state.last_seq
            stored = [await stream.get_msg(EVENTS_STREAM, sequence) for sequence in range(1, last + 1)]
        finally:
            await client.close()
        return [(message.subject, json.loads(message.data or b"{}")) for message in stored]

    def unfinished_runs(self) -> list[str]:
        query = sa.text("SELECT run_id FROM dagster.runs WHERE status NOT IN ('SUCCESS', 'FAILURE', 'CANCELED')")
        with self.engine.connect() as connection:
            return list(connection.scalars(query))


@contextmanager
def running_installation(
    folder: Path,
    *,
    database_url: str,
    nats_url: str,
    commands: dict[str, Sequence[str]],
    reroute: Callable[[dict[str, str]], dict[str, str]] = dict,
) -> Iterator[Installation]:
    """进程都就绪才给出；离开时全部结束。短的租约与确认期限：死了的几秒就有人接手。

    :param reroute: 进程看到的环境变量，例如换成网线的地址；测试自己不绕路。
    """
    settings = EtlSettings(database_url=database_url)
    engine = build_engine(settings)
    write_dagster_home(folder / "home")
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": database_url,
        "ETL_NATS_URL": nats_url,
        "DAGSTER_HOME": str(folder / "home"),
        "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(database_url),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "ETL_LEASE_SECONDS": "3",
        "ETL_TASK_ACK_WAIT_SECONDS": "2",
        "ETL_EVENT_ACK_WAIT_SECONDS": "2",
    }
    create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=environment, log_path=folder / "migrate.log")
    installation = Installation(engine, settings, nats_url, reroute(environment), folder, commands)
    try:
        installation.eventually(
            lambda: all('"ready"' in installation.log(role) for role in commands), "the processes do not become ready"
        )
        yield installation
    finally:
        for process in installation.processes.values():
            process.kill()
            process.wait()
        engine.dispose()
