"""一套真的安装，服务器停得下、起得来，进程冻得住；以及运维看得见它的五个地方。

告警由测试自己的进程看着（像监听器旁边那样），不等沉淀的时间；别的都是 `etl up`。
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from structlog.testing import capture_logs

from bridge.alerts import rules, watch
from bridge.alerts.watch import AlertWatch
from bridge.cli import options
from bridge.cli.commands import cli
from bridge.events import DataImportCompleted
from bridge.events.publish import publish_event_sync
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stack.addresses import read_addresses
from bridge.stack.embedded_nats import EmbeddedNats
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.testing.raw_data import RawData
from tests.acceptance.conftest import asking
from tests.acceptance.dagster_ui import DagsterUi
from tests.acceptance.test_broken_code import Code, load_error
from tests.chaos.processes import StackProcesses
from tests.integration.commands import use_in_commands
from tests.integration.host import etl, eventually, running
from tests.integration.test_metrics import scrape
from tests.integration.webhook_server import WebhookServer
from tests.other_sessions import end_other_sessions

Place = Literal["status", "log", "metrics", "alert", "UI"]
PATIENCE_SECONDS = 180.0
LAG_SECONDS = 5
PARTITIONS_START = date(2026, 1, 1)
"""定了，头一批数据来的时候，代码服务器就不重起。"""

_RUNS = "{ runsOrError(limit: 20) { ... on Runs { results { runId status } } } }"
_METRIC = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})?")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_DUE = sa.text("SELECT count(*) FROM etl.ledger WHERE day = :day AND requested > materialized")
_MADE = sa.text("SELECT count(*) FROM etl.ledger WHERE day = :day AND materialized_at IS NOT NULL")


class WatchedStack:
    def __init__(self, folder: Path, parts: ExitStack) -> None:
        """:param parts: 收场时要停下的，后起的先停。"""
        self._patch = parts.enter_context(pytest.MonkeyPatch.context())
        for name in ("RESTART_SECONDS", "BUSY_SECONDS", "FLICKER_SECONDS"):
            self._patch.setattr(rules, name, 0.0)
        self._patch.setattr(watch, "RETRY", Backoff(first_seconds=0.1, longest_seconds=0.2))
        self.looked_from = folder / "looked_from"
        """`etl status` 与看守所在的文件夹：它的磁盘就是它们看的。"""
        self.looked_from.mkdir()
        self._patch.setenv("ETL_STATE_DIR", str(self.looked_from))
        self._patch.setattr(options, "_PIPE_WIDTH", 1_000)  # 表格里的话不折行
        self.webhook = parts.enter_context(WebhookServer())
        self.code = Code(folder / "code")
        self.postgres = EmbeddedPostgres(folder / "postgres", durable=False)
        self.nats = EmbeddedNats(folder / "nats", durable=False)
        for server in (self.postgres, self.nats):
            server.start()
            parts.callback(server.stop)
        self.settings = EtlSettings(database_url=self.postgres.url, partitions_start=PARTITIONS_START)
        self.bridge_settings = BridgeSettings(
            nats_url=self.nats.url,
            alert_urls=(f"json://{self.webhook.host}/",),
            alert_lag_seconds=LAG_SECONDS,
            connect_timeout_seconds=1,
        )
        self.engine = build_engine(self.settings)
        parts.callback(self.engine.dispose)
        self._state_dir = folder / "state"
        self._log = folder / "stack.log"
        self._metrics_port = find_free_port()
        self.environment = {
            "ETL_DATABASE_URL": self.postgres.url,
            "ETL_NATS_URL": self.nats.url,
            "ETL_STATE_DIR": str(self._state_dir),
            "ETL_METRICS_PORT": str(self._metrics_port),
            "ETL_PARTITIONS_START": str(PARTITIONS_START),
            "ETL_LEASE_SECONDS": "3",
            "ETL_LOCK_TIMEOUT_SECONDS": "10",
            "ETL_UNANNOUNCED_AFTER_SECONDS": "10",
            "PYTHONPATH": self.code.python_path,
        }
        command = etl("up", "--port", str(find_free_port()), "--workers", "1")
        parts.enter_context(running(command, environment=self.environment, log=self._log))
        addresses = eventually(lambda: read_addresses(self._state_dir), "the stack is not ready", 300)
        self.processes = StackProcesses(self._state_dir)
        self.query = asking(addresses.ui_url)
        self.ui = DagsterUi(self.query)
        self.raw = RawData(self.engine)
        self._watch = AlertWatch(self.engine, self.settings, self.bridge_settings, state_dir=self.looked_from)
        self._own_log: list[str] = []
        self._answers: list[str] = []
        self._told_before = 0

    # ---- 五个地方：begin 之后的 --------------------------------------------------------

    def begin(self) -> None:
        """此后新添的才算这一次的。先看一眼：上一次的告警说过去了，同样的事才再说。"""
        self.alerts()
        self._own_log.clear()
        self._answers.clear()
        self._read_until = {path: path.stat().st_size for path in self._logs()}
        self._told_before = len(self.webhook.received)
        self._runs_before = {run["runId"] for run in self._runs()}
        self._scraped_before = scrape(self._metrics_port)

    def wait_until_seen(self, place: Place, fragment: str) -> None:
        """:param fragment: 那里的文字里有它；指标的是一个 PromQL 的比较，计数器看增加了多少。"""
        read: dict[Place, Callable[[], str]] = {
            "status": self.status,
            "log": self.log,
            "alert": self.alerts,
            "UI": self.shown_in_ui,
        }
        if place == "metrics":
            eventually(lambda: self.holds(fragment), f"{fragment} does not hold", PATIENCE_SECONDS)
            return
        try:
            eventually(lambda: fragment in read[place](), "", PATIENCE_SECONDS)
        except AssertionError:
            raise AssertionError(f"{place} does not say {fragment!r}, but:\n{read[place]()[-5_000:]}") from None

    def status(self) -> str:
        with pytest.MonkeyPatch.context() as patch:
            use_in_commands(patch, engine=self.engine, settings=self.settings, bridge_settings=self.bridge_settings)
            return CliRunner().invoke(cli, ["status"]).output

    def log(self) -> str:
        written = [path.read_bytes()[self._read_until.get(path, 0) :].decode() for path in self._logs()]
        return "\n".join([*written, *self._own_log])

    def holds(self, comparison: str) -> bool:
        metric, compared, number = comparison.rsplit(" ", 2)
        value, limit = self.metric(metric), float(number)
        return {"==": value == limit, ">": value > limit, ">=": value >= limit}[compared]

    def metric(self, metric: str) -> float:
        """此刻的数；计数器是增加了多少，没有的是 NaN。"""
        found = _METRIC.fullmatch(metric)
        assert found, metric
        name, labels, now = found["name"], dict(_LABEL.findall(found["labels"] or "")), scrape(self._metrics_port)
        if name not in {known for known, _ in now.samples}:
            return math.nan
        before = self._scraped_before.sum(name, **labels) if name.endswith("_total") else 0.0
        return now.sum(name, **labels) - before

    def alerts(self) -> str:
        with capture_logs() as logs:
            asyncio.run(self._watch.look())
        self._own_log.extend(json.dumps(line, ensure_ascii=False, default=str) for line in logs)
        told = self.webhook.received[self._told_before :]
        return "\n".join(f"{body['title']}\n{body['message']}" for _, body in told)

    def shown_in_ui(self) -> str:
        """新的运行的状态与它们页面上的话，代码位置的错误，点击得到的回答。"""
        try:
            pages = [f"{run['status']}: {' '.join(self.ui.messages(run['runId']))}" for run in self.new_runs()]
            return "\n".join([*pages, load_error(self.query), *self._answers])
        except (OSError, AssertionError) as error:
            return _answer(error)

    def new_runs(self) -> list[dict[str, str]]:
        return [run for run in self._runs() if run["runId"] not in self._runs_before]

    def _runs(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = self.query(_RUNS)["runsOrError"]["results"]
        return found

    def _logs(self) -> list[Path]:
        return [self._log, *(self._state_dir / "logs").glob("*.log")]

    # ---- 人做的事 ---------------------------------------------------------------------

    def click(self, day: date) -> str | None:
        """在网页上物化一天；不成的，回答算网页说的。"""
        try:
            return self.ui.launch(day=day.isoformat())
        except (OSError, AssertionError) as error:
            self._answers.append(_answer(error))
            return None

    def add_import(self, day: date, *, import_id: UUID | None = None, shop: str | None = None) -> UUID:
        """一次刚完成的导入，没有事件：这一天的一个订单；shop 是再加一行的店。"""
        at = datetime(day.year, day.month, day.day, 4, tzinfo=UTC)
        rows: list[dict[str, Any]] = [{"order_id": f"A-{uuid4()}", "ordered_at": at}]
        if shop is not None:
            rows.append({"order_id": f"B-{uuid4()}", "ordered_at": at, "shop": shop})
        return self.raw.add_import(rows, import_id=import_id, completed_at=datetime.now(UTC))

    def announce(self, import_id: UUID) -> None:
        event = DataImportCompleted(import_id=import_id)
        publish_event_sync(DATA_IMPORT_COMPLETED, event, settings=self.bridge_settings)

    def wait_until_made(self, day: date) -> None:
        def is_made() -> bool:
            with self.engine.connect() as connection:
                return connection.scalar(_DUE, {"day": day}) == 0 and bool(connection.scalar(_MADE, {"day": day}))

        eventually(is_made, f"{day} is not made", PATIENCE_SECONDS)

    def command(self, *arguments: str) -> None:
        """`etl …`，对这套安装。"""
        environment = {**os.environ, **self.environment, "ETL_METRICS_PORT": "0"}
        subprocess.run(etl(*arguments), env=environment, check=True, capture_output=True, timeout=PATIENCE_SECONDS)

    def execute(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def ask_nats(self, ask: Callable[[JetStreamConnection], Any]) -> Any:
        async def connect() -> Any:
            async with JetStreamConnection(self.bridge_settings, name="test") as connection:
                return await ask(connection)

        return asyncio.run(connect())

    # ---- 弄坏 -----------------------------------------------------------------------

    def kill(self, part: str) -> None:
        (pid,) = self.processes.leaders(part)
        os.kill(pid, signal.SIGKILL)

    @contextmanager
    def waiting(self) -> Iterator[sa.Connection]:
        """一个事务，闲多久都不断：它锁住的，别人等着。"""
        with self.engine.connect() as connection, connection.begin():
            connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield connection

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """新的会话什么也写不了，旧的都断开。"""
        database = self.engine.url.database
        admin = sa.create_engine(self.engine.url, isolation_level="AUTOCOMMIT")
        try:
            with admin.connect() as connection:
                connection.exec_driver_sql(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
                end_other_sessions(connection)
            yield
        finally:
            with admin.connect() as connection:
                connection.exec_driver_sql("SET default_transaction_read_only = off")
                connection.exec_driver_sql(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
            admin.dispose()

    @contextmanager
    def frozen(self, part: str, *, queue: str) -> Iterator[None]:
        """它什么也不做，直到放开；给出的时候，它最后的请求也过期了。"""
        (pid,) = self.processes.leaders(part)
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: self.metric(f'etl_queue_takers{{queue="{queue}"}}') == 0, f"{queue} is still taken from")
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


def _answer(error: Exception) -> str:
    return error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
