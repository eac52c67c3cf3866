"""服务器与网页先起，监听器与工人的管理者单独起、单独停，像生产环境那样各是一条命令；它们做了什么，取自它们的日志。"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from benchmarks.history import History, fill_history
from bridge.events.streams import ensure_event_streams
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stack.application import ApplicationPlan, application_services
from bridge.stack.local import Stack
from bridge.stack.readiness import Attempt, logged_ready
from bridge.stack.supervisor import Service
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.settings import EtlSettings
from etl_assets.definitions import graph
from etl_assets.embedded.child_process import launch
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.ledger.graph import write_graph
from etl_assets.testing.raw_data import RawData

_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Site:
    """服务器与网页，一段历史，还没有监听器与工人；environment 是给它们的。"""

    engine: sa.Engine
    bridge_settings: BridgeSettings
    environment: Mapping[str, str]


@contextmanager
def running_site(history: History) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(
            Path(folder),
            settings=EtlSettings(database_url=""),
            bridge_settings=BridgeSettings(nats_url=""),
            port=find_free_port(),
            workers=0,
            services=_without_listener,
        )
        with stack as addresses:
            settings = EtlSettings(database_url=addresses.database_url)
            engine = build_engine(settings)
            # 监听器等它；平常由头一个工人写下
            transact(engine, write_graph, settings.target_schema, graph)
            RawData(engine)
            fill_history(engine, settings, history)
            environment = {
                **os.environ,
                **addresses.environment(),
                "DAGSTER_DISABLE_TELEMETRY": "1",
                "MALLOC_ARENA_MAX": "2",
            }
            bridge_settings = BridgeSettings(nats_url=addresses.nats_url)
            asyncio.run(make_streams(bridge_settings))
            yield Site(engine, bridge_settings, environment)
            engine.dispose()


async def make_streams(settings: BridgeSettings) -> None:
    """没有监听器也可以发布。"""
    async with JetStreamConnection(settings, name="benchmark") as connection:
        await ensure_event_streams(connection, settings, [DATA_IMPORT_COMPLETED])


def _without_listener(plan: ApplicationPlan) -> list[Service]:
    return [service for service in application_services(plan) if service.name != "listener"]


@dataclass(frozen=True)
class Part:
    """跑着的一个部分与它的日志。"""

    attempt: Attempt

    def is_ready(self) -> bool:
        return logged_ready(self.attempt)

    def run_ends(self) -> dict[str, list[float]]:
        """它的每个工人进程做完运行的时刻，Unix 秒。

        :raises RuntimeError: 有一个运行没有成功：量的就不是平常的活了。
        """
        ends: dict[str, list[float]] = defaultdict(list)
        for line in self.attempt.log.read_text(encoding="utf-8").splitlines():
            if '"run finished"' not in line:
                continue
            event = json.loads(line)
            if not event["succeeded"]:
                raise RuntimeError(f"a run failed: {event['error']}")
            ends[event["worker"]].append(datetime.fromisoformat(event["timestamp"]).timestamp())
        return ends


@contextmanager
def running_part(*arguments: str, environment: Mapping[str, str]) -> Iterator[Part]:
    """`etl` 的一个子命令，有自己的状态文件夹，像在一台自己的主机上。停下时做完手里的。"""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "part.log"
        command = [sys.executable, "-P", "-m", "bridge.cli.main", *arguments]
        with path.open("ab") as log:
            process = launch(command, log, env={**environment, "ETL_STATE_DIR": folder})
        try:
            yield Part(Attempt(process, path, 0))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_SECONDS)


class IdleTime:
    """此后全机器的核有几成闲着：闲着，等的才是别人，不是核。"""

    def __init__(self) -> None:
        self._start = _ticks()

    def share(self) -> float:
        idle, total = (now - then for now, then in zip(_ticks(), self._start, strict=True))
        return idle / total


def _ticks() -> tuple[int, int]:
    """闲着的（等磁盘也算）与一共的；见 proc(5) 的 /proc/stat。"""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)
