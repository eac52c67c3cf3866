"""数据库在那里却不让我们做：没有表、没有权限、只读、口令不对。事件与日子不为它受过，原因没了就自己接着做。"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
import structlog
from dagster_postgres import PostgresRunStorage
from nats.js.errors import NotFoundError

from bridge.events import DataImportCompleted
from bridge.events.handlers import handlers_of
from bridge.events.listener import Listener
from bridge.events.publish import publish_event
from bridge.events.streams import consumer_name
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)
from bridge.warm_dagster.instance import open_instance
from etl_assets.core import database_sync
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import DatabaseRefusedError
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.orders.etl import materialize_orders
from etl_assets.reports.readiness import assert_writable
from etl_assets.services.materialization import RunContext
from etl_assets.services.target_schema import prepare_target
from etl_assets.testing.databases import initialize_database
from etl_assets.testing.raw_data import RawData
from tests.other_sessions import end_other_sessions
from tests.the_three import graph

from .conftest import NatsServer

Logs = list[dict[str, Any]]


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(
        nats_url=nats_server.url, event_ack_wait_seconds=5, event_retry_delay_seconds=0.05, event_max_attempts=2
    )


@asynccontextmanager
async def listening(
    settings: BridgeSettings, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Logs]:
    """真的处理器，写到 engine；给出期间的日志。"""
    monkeypatch.setattr("bridge.events.handlers.get_engine", lambda: engine)
    monkeypatch.setattr("bridge.events.handlers.get_settings", lambda: etl_settings)

    async def ring(_task: str, _lane: str) -> None:
        """没有工人。"""

    stop = asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(Listener(settings, handlers=handlers_of(graph), ring=ring).run(stop))
        try:
            await eventually(lambda: said(logs, "ready"))
            yield logs  # type: ignore[misc]  # structlog 自己的字典
        finally:
            stop.set()
            await asyncio.wait_for(task, 30)


def said(logs: Any, message: str) -> Logs:
    return [line for line in logs if line["event"] == message]


def refusals(logs: Any) -> Logs:
    return [line for line in logs if line["log_level"] == "error"]


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def announce(settings: BridgeSettings, import_ids: list[UUID]) -> None:
    for import_id in import_ids:
        await publish_event(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id), settings=settings)


async def nothing_left(settings: BridgeSettings) -> int:
    """等到每个事件都了结了；返回死信的个数。"""
    connection = JetStreamConnection(settings, name="test")
    await connection.open()
    try:
        async with asyncio.timeout(20):
            while True:
                info = await connection.context.consumer_info("EVENTS", consumer_name(settings, DATA_IMPORT_COMPLETED))
                if not (info.num_ack_pending or info.num_pending):
                    break
                await asyncio.sleep(0.05)
        return (await connection.context.stream_info("EVENTS_DLQ")).state.messages
    except NotFoundError:
        return 0
    finally:
        await connection.close()


def handled_imports(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM etl.import_events").scalar_one()


@pytest.fixture
def owner(engine: sa.Engine) -> sa.Engine:
    """超级用户的引擎：由它弄坏、修好。"""
    return engine


@pytest.fixture
def limited(owner: sa.Engine, etl_settings: EtlSettings) -> Iterator[EtlSettings]:
    """一个普通角色的设置：它的权限可以收走，口令可以改。"""
    role = f"etl_{owner.url.database}"
    execute(owner, f"CREATE ROLE {role} LOGIN PASSWORD 'first'", f"GRANT {role} TO CURRENT_USER")
    give_rights(owner, role)
    url = normalize_url(etl_settings.database_url).set(username=role, password="first")
    yield etl_settings.model_copy(update={"database_url": url.render_as_string(hide_password=False)})
    set_read_only(owner, "off")
    execute(owner, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@contextmanager
def own_engine(settings: EtlSettings) -> Iterator[sa.Engine]:
    engine = build_engine(settings)
    yield engine
    engine.dispose()


Cause = tuple[Callable[[sa.Engine, str], None], Callable[[sa.Engine, str], None], str]


def disconnect_others(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        end_other_sessions(connection)


def set_read_only(engine: sa.Engine, value: str) -> None:
    change = f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = {value}'
    execute(engine, "SET default_transaction_read_only = off", change)
    disconnect_others(engine)
    engine.dispose()


def set_password(engine: sa.Engine, role: str, password: str) -> None:
    execute(engine, f"ALTER ROLE {role} PASSWORD '{password}'")
    disconnect_others(engine)


def give_rights(engine: sa.Engine, role: str) -> None:
    execute(
        engine,
        f"GRANT USAGE ON SCHEMA public, etl TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public, etl TO {role}",
    )


def initialize(engine: sa.Engine, role: str) -> None:
    initialize_database(engine, graph)
    give_rights(engine, role)


# 弄坏、修好、该说的话
CAUSES: dict[str, Cause] = {
    "no schema etl": (
        lambda engine, _role: execute(engine, "DROP SCHEMA etl CASCADE"),
        initialize,
        "run `etl init-db`",
    ),
    "REVOKE": (
        lambda engine, role: execute(engine, f"REVOKE ALL ON etl.import_events FROM {role}"),
        give_rights,
        "lacks a right, grant it",
    ),
    "read-only": (
        lambda engine, _role: set_read_only(engine, "on"),
        lambda engine, _role: set_read_only(engine, "off"),
        "PostgreSQL is read-only",
    ),
    "source": (
        lambda engine, role: execute(engine, f"REVOKE ALL ON shop_configs FROM {role}"),
        give_rights,
        "lacks a right, grant it",
    ),
    "another password": (
        lambda engine, role: set_password(engine, role, "second"),
        lambda engine, role: set_password(engine, role, "first"),
        "refuses the user or password",
    ),
}


@pytest.mark.parametrize("cause", ["no schema etl", "REVOKE", "read-only", "another password"])
async def test_events_wait_while_the_database_refuses_and_are_handled_when_it_does_not(
    cause: str,
    settings: BridgeSettings,
    raw_data: RawData,
    owner: sa.Engine,
    limited: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage, mend, sentence = CAUSES[cause]
    imports = [raw_data.add_import([]) for _ in range(50)]
    role = str(sa.make_url(limited.database_url).username)
    damage(owner, role)
    with own_engine(limited) as engine:
        async with listening(settings, engine, limited, monkeypatch) as logs:
            await announce(settings, imports)
            await eventually(lambda: refusals(logs))
            await asyncio.sleep(1)
            lines = refusals(logs)
            await asyncio.to_thread(mend, owner, role)
            mended = time.monotonic()
            letters = await nothing_left(settings)
            waited = time.monotonic() - mended
    assert letters == 0
    assert handled_imports(owner) == len(imports)
    assert waited < 15
    assert len(lines) == 1  # 一分钟一句
    assert sentence in lines[0]["error"]


async def test_events_wait_while_all_connections_of_the_process_are_busy(
    settings: BridgeSettings,
    raw_data: RawData,
    owner: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imports = [raw_data.add_import([]) for _ in range(3)]
    small = sa.create_engine(owner.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with listening(settings, small, etl_settings, monkeypatch) as logs:
        with small.connect():
            await announce(settings, imports)
            await asyncio.sleep(1.5)
            assert "raise ETL_POOL_SIZE" in said(logs, "handler failed, trying again")[0]["error"]
        assert await nothing_left(settings) == 0
    small.dispose()
    assert handled_imports(owner) == len(imports)


# ---- 工人起来的时候 ------------------------------------------------------------------


@contextmanager
def worker_process(folder: Path, settings: EtlSettings, nats_url: str) -> Iterator[Callable[[], str]]:
    """一个真的 `etl worker`；给出读日志的函数。期间它没有死过，要它停就停。"""
    write_dagster_home(folder / "home")
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": settings.database_url,
        "ETL_NATS_URL": nats_url,
        "DAGSTER_HOME": str(folder / "home"),
        "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(settings.database_url),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bridge.cli.main", "worker"], env=environment, stdout=output, stderr=output
        )
    try:
        yield log.read_text
        assert process.poll() is None, log.read_text()
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_for_line(read_log: Callable[[], str], text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in read_log():
        assert time.monotonic() < deadline, read_log()
        time.sleep(0.1)


def test_worker_waits_at_its_start_for_a_database_that_refuses_and_then_serves(
    owner: sa.Engine, limited: EtlSettings, etl_settings: EtlSettings, nats_server: NatsServer, tmp_path: Path
) -> None:
    role = str(sa.make_url(limited.database_url).username)
    (tmp_path / "storage").mkdir()
    write_dagster_home(tmp_path / "storage")
    environment = {
        "DAGSTER_HOME": str(tmp_path / "storage"),
        "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(etl_settings.database_url),
    }
    create_dagster_storage(
        owner, schema=DAGSTER_SCHEMA, environment={**os.environ, **environment}, log_path=tmp_path / "migrate.log"
    )
    execute(owner, f"GRANT USAGE ON SCHEMA dagster TO {role}", f"GRANT ALL ON ALL TABLES IN SCHEMA dagster TO {role}")
    set_password(owner, role, "second")
    execute(owner, "ALTER TABLE shop_configs RENAME TO shops_away")
    with worker_process(tmp_path, limited, nats_server.url) as read_log:
        wait_for_line(read_log, "PostgreSQL refuses the user or password of ETL_DATABASE_URL")
        set_password(owner, role, "first")
        wait_for_line(read_log, "public.shop_configs is missing")
        execute(owner, "ALTER TABLE shops_away RENAME TO shop_configs")
        wait_for_line(read_log, '"ready"')
        assert read_log().count("the database refuses, waiting") == 2  # 两个原因，各一句


def test_worker_that_waits_for_the_database_ends_when_it_is_asked_to(
    owner: sa.Engine, limited: EtlSettings, nats_server: NatsServer, tmp_path: Path
) -> None:
    execute(owner, "DROP SCHEMA etl CASCADE")
    with worker_process(tmp_path, limited, nats_server.url) as read_log:
        wait_for_line(read_log, "run `etl init-db`")


# ---- 命令说得出来 --------------------------------------------------------------------


def etl(command: str, settings: EtlSettings, nats_url: str, **given: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
    return subprocess.run(
        [sys.executable, "-m", "bridge.cli.main", *command.split()],
        env={**environment, "ETL_DATABASE_URL": settings.database_url, "ETL_NATS_URL": nats_url, **given},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SAID = {
    "no schema etl": ("schema", "run `etl init-db`", 2),
    "REVOKE": ("schema", "lacks SELECT, INSERT, UPDATE, DELETE on etl.import_events: grant it", 0),
    "read-only": ("postgres", "PostgreSQL is read-only", 0),
    "another password": ("postgres", "refuses the user or password of ETL_DATABASE_URL", 2),
    "source": ("schema", "lacks SELECT on public.shop_configs: grant it", 0),
}


@pytest.mark.usefixtures("raw_data")
@pytest.mark.parametrize("cause", list(SAID))
def test_doctor_and_status_say_why_the_database_refuses(
    cause: str, owner: sa.Engine, limited: EtlSettings, nats_server: NatsServer
) -> None:
    role = str(sa.make_url(limited.database_url).username)
    damage, _, _ = CAUSES[cause]
    damage(owner, role)
    check, sentence, exit_code = SAID[cause]
    found = {finding["check"]: finding for finding in json.loads(etl("doctor --json", limited, nats_server.url).stdout)}
    assert found[check]["state"] == "error"
    assert sentence in found[check]["says"]
    status = etl("status", limited, nats_server.url)
    first, *rest = status.stdout.splitlines()
    assert first.startswith("database: ")
    assert sentence in first
    assert any("TASKS.event" in line for line in rest)  # 队列照样看得见
    assert (status.returncode, status.stderr) == (exit_code, "")


@pytest.mark.usefixtures("raw_data")
def test_status_shows_the_ledger_while_nats_is_away(etl_settings: EtlSettings) -> None:
    status = etl("status", etl_settings, "nats://127.0.0.1:1")
    assert status.stdout.startswith("nats: cannot reach NATS at nats://127.0.0.1:1 within 5 s")
    report = json.loads(etl("status --json", etl_settings, "nats://127.0.0.1:1").stdout)
    assert (status.returncode, status.stderr, report["queues"], report["ledger"]) == (2, "", None, [])


@pytest.mark.parametrize("side", ["the ETL's engine", "Dagster's pool"])
def test_session_opened_in_a_read_only_window_is_not_used_after_it(
    side: str, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ALTER DATABASE … SET` 管的是新会话：窗口里开的，窗口关上以后还是只读。"""
    pool = engine if side == "the ETL's engine" else _dagster_pool(etl_settings, tmp_path, monkeypatch)
    name = f'"{engine.url.database}"'
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE public.notes (note text)")
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    pool.dispose()
    with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"), pool.begin() as connection:
        connection.exec_driver_sql("INSERT INTO public.notes VALUES ('in the window')")
    with normal_session(etl_settings) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with pool.begin() as connection:
        connection.exec_driver_sql("INSERT INTO public.notes VALUES ('after it')")
    pool.dispose()


def test_session_that_was_found_read_only_is_not_asked_again(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    """工人起来时、对账之前只是看一眼：看出只读的那个会话，窗口关上以后还是只读。"""
    name = f'"{engine.url.database}"'
    with normal_session(etl_settings) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    engine.dispose()
    with pytest.raises(DatabaseRefusedError, match="read-only"), engine.begin() as connection:
        assert_writable(connection)
    with normal_session(etl_settings) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with engine.begin() as connection:
        assert_writable(connection)


def _dagster_pool(settings: EtlSettings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """工人里 Dagster 的存储用的连接池。"""
    write_dagster_home(folder / "home")
    monkeypatch.setenv("DAGSTER_HOME", str(folder / "home"))
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", build_dagster_postgres_url(settings.database_url))
    engine = build_engine(settings)
    create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=folder / "migrate.log")
    engine.dispose()
    storage = open_instance().run_storage
    assert isinstance(storage, PostgresRunStorage)
    return storage._engine


@contextmanager
def normal_session(settings: EtlSettings) -> Iterator[sa.Connection]:
    """写得了的会话：运维的。"""
    options = {"options": "-cdefault_transaction_read_only=off"}
    operator = sa.create_engine(normalize_url(settings.database_url), connect_args=options, poolclass=sa.pool.NullPool)
    with operator.begin() as connection:
        yield connection


# ---- 时区两边不一样 ------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["CET", "EET", "MET", "WET"])
def test_zone_that_means_another_to_the_server_is_refused_before_anything_is_written(
    zone: str, owner: sa.Engine, raw_data: RawData, etl_settings: EtlSettings
) -> None:
    """名字在 PostgreSQL 是没有夏令时的缩写：七月二日的零点半会算成一日。"""
    import_id = raw_data.add_import([{"ordered_at": datetime(2026, 7, 1, 22, 30, tzinfo=UTC)}])
    settings = etl_settings.model_copy(update={"timezone": zone})
    day, run = DayRange(date(2026, 7, 1), date(2026, 7, 2)), RunContext(run_id="r", assets=frozenset(graph.names))
    with own_engine(settings) as engine:
        for act in (
            lambda: request_imports(engine, settings, [ImportEvent(import_id, uuid4())]),
            lambda: materialize_orders(engine, settings, day, run),
            lambda: prepare_target(engine, settings),
        ):
            with pytest.raises(DatabaseRefusedError, match=f"ETL_TIMEZONE={zone} .* such as Europe/Berlin"):
                act()
    with owner.connect() as connection:
        written = "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM etl.ledger), (SELECT count(*) FROM etl.import_events)"
        assert connection.exec_driver_sql(written).one() == (0, 0, 0)


def test_zone_that_the_server_does_not_know_is_refused(etl_settings: EtlSettings) -> None:
    settings = etl_settings.model_copy(update={"timezone": "Mars/Olympus"})
    with (
        own_engine(settings) as engine,
        pytest.raises(DatabaseRefusedError, match="does not know ETL_TIMEZONE=Mars/Olympus"),
    ):
        engine.connect()


def test_zone_is_asked_about_once_per_process(etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """不是每个运行、也不是每个连接一句。"""
    looks: list[str] = []
    look = database_sync.assert_same_zone
    monkeypatch.setattr(
        database_sync, "assert_same_zone", lambda *given: (looks.append(given[1].timezone), look(*given))
    )
    for zone in ("Asia/Shanghai", "Europe/Berlin", "America/New_York", "UTC"):
        with (
            own_engine(etl_settings.model_copy(update={"timezone": zone})) as engine,
            engine.connect(),
            engine.connect(),
        ):
            pass
    assert looks == ["Asia/Shanghai", "Europe/Berlin", "America/New_York", "UTC"]


def test_worker_waits_where_the_zone_is_another(
    etl_settings: EtlSettings, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETL_TIMEZONE", "CET")
    with worker_process(tmp_path, etl_settings, nats_server.url) as read_log:
        wait_for_line(read_log, "ETL_TIMEZONE=CET is another time zone to PostgreSQL")


def test_commands_say_what_to_write_for_a_zone_that_is_another(
    etl_settings: EtlSettings, nats_server: NatsServer
) -> None:
    doctor = etl("doctor --json", etl_settings, nats_server.url, ETL_TIMEZONE="CET")
    found = {finding["check"]: finding for finding in json.loads(doctor.stdout)}
    assert found["postgres"]["state"] == "error"
    assert "such as Europe/Berlin" in found["postgres"]["says"]
    status = etl("status", etl_settings, nats_server.url, ETL_TIMEZONE="CET")
    assert status.stdout.startswith("database: ETL_TIMEZONE=CET is another time zone")
    created = etl("init-db", etl_settings, nats_server.url, ETL_TIMEZONE="CET")
    assert created.returncode == 2
    assert len(created.stderr.splitlines()) == 1
    assert "such as Europe/Berlin" in created.stderr
