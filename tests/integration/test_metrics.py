"""指标：四个工人在忙，一个被 kill -9，取来的与数据库说的一样；面板的每个查询都有数据，规则都能算。"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from bridge.events import DataImportCompleted, EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.operations.metrics_endpoint import ProcessMetrics
from bridge.settings import BridgeSettings
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.ledger.locks import lock_days
from etl_assets.testing.raw_data import RawData
from tests.unit.test_metrics_files import ALERTS, dashboard_queries, metrics_named_in

from .conftest import NatsServer
from .host import etl, eventually, host_environment, running

BLOCKED = date(2026, 1, 5)
LOAD_DAYS = [date(2025, 3, 1) + timedelta(days=2 * number) for number in range(20)]
IMPORTS_PER_DAY = 2
COUNT_AND_WAIT = """
import sys
from pathlib import Path
from bridge.operations import metrics_endpoint
from etl_assets.core import metrics
from etl_assets.core.log import configure_logging
if sys.argv[2:]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
configure_logging("test", console=False)
metrics_endpoint._AGAIN_SECONDS = 0.2
metrics_endpoint.start_metrics(Path(sys.argv[1]), records=True)
metrics.lease_lost()
print("counted", flush=True)
sys.stdin.read()
"""

UP = """
import sys
from pathlib import Path
from bridge.cli.options import start_metrics_if_wanted
from bridge.settings import get_bridge_settings
from bridge.stack.local import Stack
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import get_settings
configure_logging("stack", console=False)
folder = Path(sys.argv[1])
start_metrics_if_wanted(folder, records=False)
stack = Stack(
    folder, settings=get_settings(), bridge_settings=get_bridge_settings(), durable=False, services=lambda plan: []
)
stack.run(lambda addresses: print("up", flush=True))
"""


class Scrape:
    """取来的一份：名字与标签 → 数。"""

    def __init__(self, text: str) -> None:
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        self.kinds = {family.name: family.type for family in text_string_to_metric_families(text)}

    def sum(self, name: str, **labels: str) -> float:
        return sum(
            value for (found, own), value in self.samples.items() if found == name and own >= frozenset(labels.items())
        )

    @property
    def counters(self) -> dict[tuple[str, frozenset[Any]], float]:
        return {key: value for key, value in self.samples.items() if key[0].endswith(("_total", "_count", "_bucket"))}


def scrape(port: int) -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        return Scrape(response.read().decode())


@pytest.fixture
def environment(engine: sa.Engine, nats_server: NatsServer, tmp_path: Path) -> dict[str, str]:
    return {**host_environment(engine, nats_server.url, tmp_path), "ETL_METRICS_PORT": str(find_free_port())}


@pytest.fixture
def prometheus(environment: dict[str, str], tmp_path: Path) -> Iterator[str | None]:
    """真的 Prometheus 取它，算规则；没有装就没有。"""
    if shutil.which("prometheus") is None:
        yield None
        return
    port = find_free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "etl", "static_configs": [{"targets": [f"127.0.0.1:{environment['ETL_METRICS_PORT']}"]}]}
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    options = {
        "config.file": tmp_path / "prometheus.yml",
        "storage.tsdb.path": tmp_path / "tsdb",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with running(command, environment={}, log=tmp_path / "prometheus.log"):
        yield f"http://127.0.0.1:{port}/api/v1"


def ask(prometheus: str, what: str, **parameters: str) -> Any:
    address = f"{prometheus}/{what}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(address, timeout=30) as response:  # noqa: S310  # 自己的服务器
        return json.load(response)["data"]


def add_import(raw_data: RawData, day: date, number: int, *, bad_rows: int = 0) -> UUID:
    at = datetime(day.year, day.month, day.day, 4, tzinfo=UTC)
    good = [
        {"order_id": f"{day}-{number}-{line}", "customer_name": f"客户{day}-{line}", "ordered_at": at}
        for line in range(3)
    ]
    return raw_data.add_import([*good, *({"shop": "没有的店", "ordered_at": at} for _ in range(bad_rows))])


async def publish(settings: BridgeSettings, import_ids: list[UUID]) -> None:
    async with EventPublisher(settings) as publisher:
        for import_id in import_ids:
            event = DataImportCompleted(
                event_id=uuid4(), import_id=import_id, occurred_at=datetime.now(UTC), status="completed"
            )
            await publisher.publish(DATA_IMPORT_COMPLETED, event)


async def publish_garbage(settings: BridgeSettings) -> None:
    async with JetStreamConnection(settings, name="test") as connection:
        await connection.publish(DATA_IMPORT_COMPLETED, b"no event", message_id=str(uuid4()))


def worker_of(engine: sa.Engine, day: date) -> int | None:
    """占着这一天的工人的进程号。"""
    with engine.connect() as connection:
        owner: str | None = connection.scalar(
            sa.text("SELECT owner FROM etl.leases WHERE :day BETWEEN first_day AND last_day"), {"day": day}
        )
    return int(owner.rpartition(":")[2]) if owner else None


def said_by_the_database(engine: sa.Engine) -> dict[str, int]:
    statements = {
        "runs that succeeded": "SELECT count(*) FROM dagster.runs WHERE status = 'SUCCESS'",
        "runs that failed": "SELECT count(*) FROM dagster.runs WHERE status = 'FAILURE'",
        "runs in all": "SELECT count(*) FROM dagster.runs",
        "imports": "SELECT count(*) FROM etl.import_events",
        "orders": "SELECT count(*) FROM orders",
        "customers": "SELECT count(*) FROM customers",
        "leads": "SELECT count(*) FROM business_leads",
        "rejected": "SELECT count(*) FROM etl.rejected_rows",
        "due": "SELECT count(*) FROM etl.ledger WHERE requested > materialized",
        "leases": "SELECT count(*) FROM etl.leases",
    }
    with engine.connect() as connection:
        return {name: connection.exec_driver_sql(statement).scalar_one() for name, statement in statements.items()}


def said_by_the_metrics(found: Scrape) -> dict[str, int]:
    def rows(asset: str) -> float:
        return found.sum("etl_rows_total", asset=asset, action="inserted") - found.sum(
            "etl_rows_total", asset=asset, action="deleted"
        )

    said = {
        "runs that succeeded": found.sum("etl_runs_total", outcome="success"),
        "runs that failed": found.sum("etl_runs_total", outcome="failure"),
        "runs in all": found.sum("etl_runs_total"),
        "imports": found.sum("etl_imports_total"),
        "orders": rows("orders"),
        "customers": rows("customers"),
        "leads": rows("leads"),
        "rejected": found.sum("etl_rejected_rows_total"),
        "due": found.sum("etl_partitions_due") + found.sum("etl_partitions_held"),
        "leases": found.sum("etl_runs_in_progress"),
    }
    return {name: int(value) for name, value in said.items()}


@pytest.mark.timeout(300)
def test_scrape_under_load_adds_up_to_the_database_though_a_worker_is_killed(
    environment: dict[str, str],
    engine: sa.Engine,
    raw_data: RawData,
    nats_server: NatsServer,
    prometheus: str | None,
    tmp_path: Path,
) -> None:
    settings, port = BridgeSettings(nats_url=nats_server.url), int(environment["ETL_METRICS_PORT"])
    scrapes: list[Scrape] = []
    imports = [add_import(raw_data, day, number) for number in range(IMPORTS_PER_DAY) for day in LOAD_DAYS]
    blocked = add_import(raw_data, BLOCKED, 0, bad_rows=2)

    def look() -> Scrape:
        scrapes.append(scrape(port))
        return scrapes[-1]

    with ExitStack() as processes, engine.connect() as other:
        # 锁等不久的监听器：有事件要再来
        listening = {**environment, "ETL_LOCK_TIMEOUT_SECONDS": "1"}
        log = tmp_path / "workers.log"
        processes.enter_context(running(etl("listen"), environment=listening, log=tmp_path / "listener.log"))
        processes.enter_context(running(etl("worker", "--processes", "4"), environment=environment, log=log))
        eventually(lambda: log.read_text().count('"ready"') == 4, "the workers do not become ready", 150)
        with other.begin():
            other.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            lock_days(other, "public", DayRange(BLOCKED, BLOCKED))
            with engine.begin() as another:
                another.exec_driver_sql("LOCK TABLE etl.import_events IN ACCESS EXCLUSIVE MODE")
                asyncio.run(publish(settings, [blocked]))
                eventually(lambda: look().sum("etl_event_retries_total", reason="passing"), "no event is tried again")
            pid = eventually(lambda: worker_of(engine, BLOCKED), "nobody takes the day whose lock is held")
            asyncio.run(publish(settings, imports))
            asyncio.run(publish_garbage(settings))
            eventually(lambda: look().sum("etl_runs_total", outcome="success") >= 3, "no runs beside the blocked one")
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: look().sum("etl_leases_lost_total"), "the dead worker's lease is not buried")
        eventually(
            lambda: (
                (said := said_by_the_database(engine))["due"] == said["leases"] == 0
                and said["imports"] == len(imports) + 1
            ),
            "the days are not made",
            150,
        )
        expected = said_by_the_database(engine)
        assert expected["runs that failed"] == 1
        assert expected["orders"] == 3 * (len(imports) + 1)
        assert expected["rejected"] == 2
        eventually(
            lambda: said_by_the_metrics(look()) == expected,
            f"the metrics say {said_by_the_metrics(scrape(port))}, the database {expected}",
            20,
        )
        last = scrapes[-1]
        assert last.sum("etl_leases_lost_total") == 1
        assert last.sum("etl_events_total", outcome="refused") == last.sum("etl_dead_letters_total") == 1
        assert last.sum("etl_events_total", outcome="handled", subject=DATA_IMPORT_COMPLETED) == len(imports) + 1
        assert last.sum("etl_stream_messages", stream="EVENTS_DLQ") == 1
        assert (
            last.sum("etl_claimed_to_ended_seconds_count", outcome="success")
            == last.sum("etl_event_stored_to_tables_seconds_count")
            == expected["runs that succeeded"]
        )
        assert last.sum("etl_handled_to_claimed_seconds_count") == expected["runs in all"]
        for earlier, later in pairwise(scrapes):
            assert [key for key, value in earlier.counters.items() if later.counters.get(key, 0) < value] == []
        # 补上的工人占了死者的席位
        eventually(lambda: log.read_text().count('"ready"') == 5, "the killed worker is not replaced", 60)
        eventually(lambda: scrape(port).sum("etl_database_pool_limit") == 5 * 10, "not five processes record")
        assert len(list((tmp_path / "state" / "metrics").glob("counter_*.db"))) == 5

        named = {name for query in dashboard_queries() for name in metrics_named_in(query)}
        assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in named} <= {
            name if last.kinds[name] != "counter" else f"{name}_total" for name in last.kinds
        }
        if prometheus is None:
            pytest.skip("no prometheus here (Debian: apt-get install prometheus): the queries were not evaluated")
        assert_dashboard_has_data(prometheus)
        assert_rules_are_evaluated(prometheus)


def assert_dashboard_has_data(prometheus: str) -> None:
    """Prometheus 自己隔一会儿才来取，取到的也许还是早先的。"""

    def has_data(query: str) -> bool:
        found = ask(prometheus, "query", query=query.replace("$__rate_interval", "5m"))["result"]
        return any(value["value"][1] != "NaN" for value in found)

    for query in dashboard_queries():
        eventually(lambda query=query: has_data(query), f"no data for {query}", 60)  # type: ignore[misc]


def assert_rules_are_evaluated(prometheus: str) -> None:
    def rules() -> dict[str, dict[str, Any]]:
        (group,) = ask(prometheus, "rules")["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    eventually(lambda: rules()["EtlDeadLetters"]["state"] == "firing", "the rule of dead letters does not fire", 60)
    found = rules()
    assert {name: rule.get("lastError") for name, rule in found.items() if rule["health"] != "ok"} == {}
    assert found["EtlDatabaseDown"]["state"] == found["EtlNoListener"]["state"] == "inactive"


# ---- 一台机器上的几个进程 -------------------------------------------------------------


@contextmanager
def counting(state_dir: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """一个记了一次数、等着的进程；服务器都不在。"""
    environment = {
        **os.environ,
        "ETL_METRICS_PORT": str(port),
        "ETL_DATABASE_URL": "postgresql://etl:secret@127.0.0.1:1/etl",
        "ETL_NATS_URL": "nats://127.0.0.1:1",
    }
    command = [sys.executable, "-c", COUNT_AND_WAIT, str(state_dir), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n", process.stderr and process.stderr.read()
        try:
            yield process
        finally:
            process.kill()


def said_by(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    process.kill()
    _, errors = process.communicate()
    return [json.loads(line) for line in errors.splitlines() if line.startswith("{")]


def test_another_process_serves_when_the_one_that_did_is_killed_and_counts_go_on(tmp_path: Path) -> None:
    port, state_dir = find_free_port(), tmp_path / "state"
    with counting(state_dir, port) as first:
        eventually(lambda: scrape(port).sum("etl_leases_lost_total") == 1, "the first does not serve")
        with counting(state_dir, port):
            eventually(lambda: scrape(port).sum("etl_leases_lost_total") == 2, "the second is not counted")
            first.kill()
            first.wait()
            eventually(lambda: scrape(port).sum("etl_leases_lost_total") == 2, "nobody took over")
            with counting(state_dir, port):
                eventually(lambda: scrape(port).sum("etl_leases_lost_total") == 3, "the third is not counted")
                assert len(list((state_dir / "metrics").glob("counter_*.db"))) == 2


def test_stack_serves_what_its_own_servers_say(etl_settings: EtlSettings, tmp_path: Path) -> None:
    """内嵌的 NATS 的地址要到栈起来才有。"""
    port = find_free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "ETL_NATS_URL"},
        "ETL_METRICS_PORT": str(port),
        "ETL_DATABASE_URL": etl_settings.database_url,
    }
    command = [sys.executable, "-c", UP, str(tmp_path / "state")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            found = scrape(port)
            assert (found.sum("etl_database_up"), found.sum("etl_nats_up")) == (1, 1)
            assert found.sum("etl_database_connections_limit") > 0
        finally:
            process.terminate()


def test_servers_that_are_away_are_said_and_hide_nothing_else(tmp_path: Path) -> None:
    port = find_free_port()
    with counting(tmp_path / "state", port) as process:
        found = eventually(lambda: scrape(port), "it does not serve")
        assert (found.sum("etl_database_up"), found.sum("etl_nats_up")) == (0, 0)
        assert found.sum("etl_leases_lost_total") == 1
        assert "etl_partitions_due" not in {name for name, _ in found.samples}
        assert not any("secret" in json.dumps(line) for line in said_by(process))


def test_port_that_is_taken_is_one_warning_and_is_used_once_it_is_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with counting(tmp_path / "state", port) as process:
            time.sleep(1)  # 试过好几回
            taken.close()
            eventually(lambda: scrape(port).sum("etl_leases_lost_total") == 1, "it does not try again")
            warnings = [line for line in said_by(process) if line["level"] == "warning"]
            assert [line["message"] for line in warnings if "serve metrics" in line["message"]] == [
                "cannot serve metrics, trying again"
            ]


def test_folder_that_cannot_be_used_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with counting(tmp_path / "state", find_free_port()) as process:
        messages = [line["message"] for line in said_by(process)]
        assert messages == ["this process records and serves no metrics"]


def test_full_disk_is_one_warning(tmp_path: Path) -> None:
    with counting(tmp_path / "state", find_free_port(), "with a full disk") as process:
        messages = [line["message"] for line in said_by(process)]
        assert messages.count("this process records no metrics") == 1


def test_files_torn_by_a_power_cut_begin_anew_and_the_others_go_on(tmp_path: Path) -> None:
    port, folder = find_free_port(), tmp_path / "state" / "metrics"
    with counting(tmp_path / "state", port), counting(tmp_path / "state", port):
        pass
    torn = folder / "counter_0.db"
    torn.write_bytes((4096).to_bytes(4, "little") + bytes(torn.stat().st_size - 4))
    (folder / "histogram_1.db").write_bytes(b"\xff" * 100)
    with counting(tmp_path / "state", port):
        assert eventually(lambda: scrape(port), "it does not serve").sum("etl_leases_lost_total") == 2


def test_what_a_dead_process_held_is_not_told_and_what_it_counted_is(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "metrics"
    with counting(tmp_path / "state", find_free_port()):
        assert len(list(folder.glob("gauge_*.db"))) == 1
    found = {metric.name: metric for metric in ProcessMetrics(folder).collect()}
    assert "etl_database_pool_limit" not in found
    assert [sample.value for sample in found["etl_leases_lost"].samples] == [1.0]
