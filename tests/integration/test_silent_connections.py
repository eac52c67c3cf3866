"""哑了的连接：两头都在等对方的切断，真在做的、停下来的、问不到的不动。都在真的 PostgreSQL 前面的网线上。"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus

from bridge.events import DataImportCompleted, handlers
from bridge.events.handlers import handlers_of
from bridge.events.listener import Listener
from bridge.events.publish import publish_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)
from bridge.warm_dagster import instance as dagster_instance
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.instance import open_instance
from bridge.warm_dagster.internals import context_creation_job
from etl_assets.core import silent_connections
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseUnavailableError
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.silent_connections import SilenceWatch
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.ledger.claims import Claim
from etl_assets.ledger.leases import LeaseState
from etl_assets.ledger.locks import lock_days, lock_imports
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData
from tests.chaos.network import Link, Network
from tests.the_three import graph

from .conftest import NatsServer
from .warm_runs import warm_worker

LOCK = sa.text("SELECT pg_advisory_xact_lock(7)")
CUT_SECONDS = 10.0
"""放低了的耐心之下，哑了的连接不到一秒就切断；忙的机器也够。"""
LONG_SECONDS = 1.5
"""放低了的耐心的几倍。"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silent_connections, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(silent_connections, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(silent_connections, "LAST_CHANCE_SECONDS", 0.2)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def link(network: Network, etl_settings: EtlSettings) -> Link:
    return network.lay("postgres", sa.make_url(etl_settings.database_url).port or 0)


@pytest.fixture
def far_settings(link: Link, etl_settings: EtlSettings) -> EtlSettings:
    """同一个数据库，隔着网线。"""
    url = sa.make_url(etl_settings.database_url).set(host="127.0.0.1", port=link.port)
    return etl_settings.model_copy(update={"database_url": url.render_as_string(hide_password=False)})


@pytest.fixture
def far(far_settings: EtlSettings) -> Iterator[sa.Engine]:
    engine = build_engine(far_settings)
    yield engine
    engine.dispose()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """测试结束时不等还卡着的线程：没有切断的，用例自己已经失败。"""
    executor = ThreadPoolExecutor(4)
    yield executor
    executor.shutdown(wait=False)


def ask(engine: sa.Engine, statement: sa.Executable = LOCK) -> Any:
    with translated_errors(), engine.begin() as connection:
        return connection.execute(statement).scalar()


def drop_while_waiting(
    network: Network,
    link: Link,
    engine: sa.Engine,
    work: Callable[[], Future[Any]],
    *,
    lock: Callable[[sa.Connection], object] = lambda connection: connection.execute(LOCK),
) -> Future[Any]:
    """让 work 的语句等着一把锁，线哑了，锁才放开：服务器做完了，回答没有到。"""
    with engine.begin() as connection:
        lock(connection)
        future = work()
        until(lambda: someone_waits(connection))
        network.drop(link)
    return future


def someone_waits(connection: sa.Connection) -> bool:
    """这个数据库里有人在等锁。"""
    waiting = sa.text(
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database()"
    )
    return bool(connection.scalar(waiting))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_statement_whose_answer_is_swallowed_fails_as_unavailable_and_the_next_one_works(
    network: Network, link: Link, engine: sa.Engine, far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    silent = drop_while_waiting(network, link, engine, lambda: pool.submit(ask, far))
    with pytest.raises(DatabaseUnavailableError):
        silent.result(CUT_SECONDS)
    assert ask(far, sa.text("SELECT 1")) == 1


def test_session_of_a_silent_connection_lets_go_of_its_locks(
    network: Network, link: Link, engine: sa.Engine, far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    silent = drop_while_waiting(network, link, engine, lambda: pool.submit(ask, far))
    with pytest.raises(DatabaseUnavailableError):
        silent.result(CUT_SECONDS)
    pool.submit(ask, engine).result(CUT_SECONDS)


def test_other_connections_of_a_silent_pool_cost_no_further_wait(
    network: Network,
    link: Link,
    engine: sa.Engine,
    far: sa.Engine,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with far.connect() as one, far.connect() as two:
        one.scalar(sa.text("SELECT 1"))
        two.scalar(sa.text("SELECT 1"))
    silent = drop_while_waiting(network, link, engine, lambda: pool.submit(ask, far))
    with pytest.raises(DatabaseUnavailableError):
        silent.result(CUT_SECONDS)
    monkeypatch.setattr(silent_connections, "PATIENCE_SECONDS", 600)
    with far.connect() as one, far.connect() as two:
        assert pool.submit(lambda: [one.scalar(sa.text("SELECT 1")), two.scalar(sa.text("SELECT 1"))]).result(
            CUT_SECONDS
        ) == [1, 1]


def test_ping_of_an_idle_connection_that_fell_silent_is_cut_and_a_new_connection_is_lent(
    network: Network, link: Link, far: sa.Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etl_assets.core.database_sync._IDLE_SECONDS", 0)
    assert ask(far, sa.text("SELECT 1")) == 1
    network.drop(link)
    assert pool.submit(ask, far, sa.text("SELECT 2")).result(CUT_SECONDS) == 2


def test_copy_whose_last_words_are_swallowed_is_cut(
    network: Network, link: Link, far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    def copy() -> None:
        with translated_errors(), far.begin() as connection:
            driver: Any = connection.connection.driver_connection
            driver.execute("CREATE TEMPORARY TABLE staged (n int)")
            with driver.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as writing:
                writing.write("1\n")
                network.drop(link)

    with pytest.raises(DatabaseUnavailableError):
        pool.submit(copy).result(CUT_SECONDS)


def test_statement_that_works_or_waits_for_a_lock_is_left_alone(
    engine: sa.Engine, far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    working = pool.submit(ask, far, sa.select(sa.literal("done")).select_from(sa.func.pg_sleep(LONG_SECONDS)))
    with engine.begin() as connection:
        connection.execute(LOCK)
        waiting = pool.submit(ask, far)
        assert working.result(CUT_SECONDS) == "done"
    waiting.result(CUT_SECONDS)


def test_copy_in_between_whose_chunks_the_client_pauses_is_left_alone(far: sa.Engine) -> None:
    with far.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("CREATE TEMPORARY TABLE staged (n int)")
        with driver.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as copy:
            copy.write("1\n")
            time.sleep(LONG_SECONDS)
            copy.write("2\n")
        assert connection.scalar(sa.text("SELECT count(*) FROM staged")) == 2


def test_copy_out_between_whose_rows_the_client_pauses_is_left_alone(far: sa.Engine) -> None:
    """20 MB：服务器写满了缓冲，等着我们读。"""
    with far.begin() as connection:
        driver: Any = connection.connection.driver_connection
        with (
            driver.cursor() as cursor,
            cursor.copy("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT") as copy,
        ):
            assert copy.read()
            time.sleep(LONG_SECONDS)
            assert sum(1 for _ in copy) == 19_999


def test_server_that_answers_nobody_for_a_while_loses_no_statement(
    network: Network, link: Link, far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    """冻住了又醒来的服务器：问不到它，就等着；换一条连接也没有用。"""
    with far.connect() as connection:
        connection.execute(sa.text("CREATE TEMPORARY TABLE kept AS SELECT 'kept' AS word"))
        network.cut(link)
        word = pool.submit(connection.scalar, sa.text("SELECT word FROM kept"))
        time.sleep(2 * LONG_SECONDS)
        assert not word.done()
        network.heal(link, is_reset=False)
        assert word.result(CUT_SECONDS) == "kept"


@pytest.fixture
def pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    """网线上像有一个连接池：会话的编号是它编的。"""

    async def pump(_link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                before, key_data, after = data.partition(b"K\0\0\0\x0c")
                writer.write(before + key_data + b"\x7f\xff\xff\xff" + after[4:] if key_data else data)
        writer.close()

    monkeypatch.setattr(Link, "_pump", pump)


@pytest.mark.usefixtures("pooler")
def test_statement_behind_a_pooler_that_makes_up_session_numbers_is_left_alone(
    far: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    """这样的会话服务器当然说没有；由此切断的话，长的语句永远做不完。"""
    with far.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.info.backend_pid == 0x7FFFFFFF
        long = pool.submit(connection.scalar, sa.select(sa.literal("done")).select_from(sa.func.pg_sleep(LONG_SECONDS)))
        assert long.result(CUT_SECONDS) == "done"


def test_engine_with_a_limit_waits_no_longer_whatever_the_server_does(
    far_settings: EtlSettings, engine: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    impatient = build_engine(far_settings, longest_wait_seconds=0.5)
    with engine.begin() as connection:
        connection.execute(LOCK)
        with pytest.raises(DatabaseUnavailableError):
            pool.submit(ask, impatient).result(CUT_SECONDS)
    impatient.dispose()


@pytest.fixture
def limited(far_settings: EtlSettings) -> Iterator[sa.Engine]:
    """问不出什么的，等半秒多就切断。"""
    engine = sa.create_engine(sa.make_url(far_settings.database_url).set(drivername="postgresql+psycopg"))
    SilenceWatch(engine, limit_seconds=0.6)
    yield engine
    engine.dispose()


def test_statement_that_waits_for_a_lock_beyond_the_limit_is_left_alone_in_a_server_that_can_be_asked(
    engine: sa.Engine, limited: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    """切断了，服务器照样等下去、做下去；再做一次就是两次。"""
    with engine.begin() as connection:
        connection.execute(LOCK)
        waiting = pool.submit(ask, limited)
        time.sleep(2 * LONG_SECONDS)
        assert not waiting.done()
    waiting.result(CUT_SECONDS)


@pytest.mark.usefixtures("pooler")
def test_statement_behind_a_pooler_is_not_waited_for_beyond_the_limit(
    engine: sa.Engine, limited: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    with engine.begin() as connection:
        connection.execute(LOCK)
        with pytest.raises(DatabaseUnavailableError):
            pool.submit(ask, limited).result(CUT_SECONDS)


def test_server_that_cannot_be_asked_beyond_the_limit_is_not_waited_for(
    network: Network, link: Link, limited: sa.Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silent_connections, "_PROBE_SECONDS", 2)
    with limited.connect() as connection:
        connection.scalar(sa.text("SELECT 1"))
        network.cut(link)
        silent = pool.submit(connection.scalar, sa.text("SELECT 2"))
        with pytest.raises(sa.exc.OperationalError):
            silent.result(2 * CUT_SECONDS)
    network.heal(link, is_reset=True)


def test_engine_of_dagster_is_watched_in_the_same_way(
    network: Network, link: Link, engine: sa.Engine, far_settings: EtlSettings, pool: ThreadPoolExecutor
) -> None:
    dagster = sa.create_engine(build_dagster_postgres_url(far_settings.database_url), isolation_level="AUTOCOMMIT")
    SilenceWatch(dagster, limit_seconds=60)

    def work() -> None:
        with dagster.connect() as connection:
            connection.execute(LOCK)

    silent = drop_while_waiting(network, link, engine, lambda: pool.submit(work))
    with pytest.raises(sa.exc.OperationalError):
        silent.result(CUT_SECONDS)
    pool.submit(work).result(CUT_SECONDS)
    dagster.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_kernel_gives_up_a_peer_that_acknowledges_nothing(
    far: sa.Engine, far_settings: EtlSettings, driver: str
) -> None:
    engine = far if driver == "psycopg" else sa.create_engine(build_dagster_postgres_url(far_settings.database_url))
    with engine.connect() as connection:
        connected: Any = connection.connection.driver_connection
        with socket.fromfd(connected.fileno(), socket.AF_INET, socket.SOCK_STREAM) as own:
            options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
            assert [own.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 2, 3, 30_000]
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    engine.dispose()


def test_watch_ends_with_the_last_connection_and_begins_again_with_the_next(far: sa.Engine) -> None:
    def watchers() -> int:
        return sum(thread.name == "silence-watch" for thread in threading.enumerate())

    before = watchers()
    ask(far, sa.text("SELECT 1"))
    assert watchers() == before + 1
    far.dispose()
    until(lambda: watchers() == before)
    ask(far, sa.text("SELECT 1"))
    assert watchers() == before + 1


# ---- 监听器与工人 -----------------------------------------------------------------


@pytest.fixture
def worker(
    location: CodeLocation, far: sa.Engine, far_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunWorker]:
    """隔着网线的工人。"""
    with warm_worker(location, far, far_settings, tmp_path, monkeypatch) as worker:
        yield worker


@pytest.fixture
def claim(worker: RunWorker, engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> Claim:
    """工人领到了一天。"""
    request_imports(engine, etl_settings, [ImportEvent(raw_data.add_import([{}]), uuid4())])
    claim = worker.claim()
    assert claim is not None
    return claim


async def test_event_whose_intake_falls_silent_is_handled_by_the_next_delivery(
    network: Network,
    link: Link,
    engine: sa.Engine,
    far: sa.Engine,
    far_settings: EtlSettings,
    raw_data: RawData,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handlers, "get_engine", lambda: far)
    monkeypatch.setattr(handlers, "get_settings", lambda: far_settings)
    settings = BridgeSettings(nats_url=nats_server.url, event_retry_delay_seconds=0.1)
    import_id = raw_data.add_import([{}])
    rung, stop = asyncio.Event(), asyncio.Event()

    async def ring(_task_name: str, _lane: str) -> None:
        rung.set()

    listening = asyncio.create_task(Listener(settings, handlers=handlers_of(graph), ring=ring).run(stop))
    try:
        with engine.begin() as connection:
            lock_imports(connection, far_settings.target_schema, [import_id])
            await publish_event(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id), settings=settings)
            await asyncio.to_thread(until, lambda: someone_waits(connection))
            network.drop(link)
        async with asyncio.timeout(2 * CUT_SECONDS):
            await rung.wait()
    finally:
        stop.set()
        async with asyncio.timeout(2 * CUT_SECONDS):
            await listening
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(ledger).where(ledger.c.requested > 0))


def test_run_whose_data_connection_falls_silent_fails_and_another_run_does_its_day(
    network: Network,
    link: Link,
    engine: sa.Engine,
    worker: RunWorker,
    claim: Claim,
    pool: ThreadPoolExecutor,
    read_table: ReadTable,
) -> None:
    held = worker.start(claim)
    silent = drop_while_waiting(
        network,
        link,
        engine,
        lambda: pool.submit(worker.execute, held),
        lock=lambda connection: lock_days(connection, worker.settings.target_schema, [claim.days.first]),
    )
    result = silent.result(3 * CUT_SECONDS)
    assert {failure.kind for failure in result.failures} == {"transient"}
    with engine.begin() as connection:
        connection.execute(sa.update(ledger).values(retry_at=None))
    again = worker.claim()
    assert again is not None
    assert again.retry_of == held.run.run_id
    assert worker.execute(worker.start(again)).succeeded
    assert read_table("orders").height == 1


def test_heartbeat_that_falls_silent_is_repeated_on_a_new_connection_before_the_lease_expires(
    network: Network, link: Link, worker: RunWorker, claim: Claim, pool: ThreadPoolExecutor
) -> None:
    held = worker.start(claim)
    hasty = replace(worker, lease_seconds=6)
    assert hasty.heartbeat(held.lease) is LeaseState.VALID
    network.drop(link)
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailableError):
        pool.submit(hasty.heartbeat, held.lease).result(CUT_SECONDS)
    assert pool.submit(hasty.heartbeat, held.lease).result(CUT_SECONDS) is LeaseState.VALID
    assert time.monotonic() - started < hasty.lease_seconds
    hasty.heartbeats.dispose()


def test_heartbeat_does_not_wait_for_a_connection_of_the_runs(
    worker: RunWorker, claim: Claim, pool: ThreadPoolExecutor
) -> None:
    held = worker.start(claim)
    with ExitStack() as used:
        for _ in range(2 * worker.settings.pool_size):
            used.enter_context(worker.engine.connect())
        assert pool.submit(worker.heartbeat, held.lease).result(CUT_SECONDS) is LeaseState.VALID


def test_run_ends_though_the_storage_of_dagster_falls_silent(
    network: Network,
    engine: sa.Engine,
    worker: RunWorker,
    claim: Claim,
    pool: ThreadPoolExecutor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """它的那条线哑了，数据的没有；日子不扣住，再做一次就成。"""
    dagster_link = network.lay("dagster", engine.url.port or 0)
    url = engine.url.set(host="127.0.0.1", port=dagster_link.port).render_as_string(hide_password=False)
    with real_instance(engine, url, tmp_path, monkeypatch) as instance:
        far_worker = replace(worker, instance=instance)
        held = far_worker.start(claim)
        silent = drop_while_waiting(
            network,
            dagster_link,
            engine,
            lambda: pool.submit(far_worker.execute, held),
            lock=lambda connection: connection.exec_driver_sql("LOCK TABLE dagster.event_logs"),
        )
        assert not silent.result(3 * CUT_SECONDS).succeeded
        run = instance.get_run_by_id(held.run.run_id)
        assert run is not None
        assert run.status is DagsterRunStatus.FAILURE
        with engine.begin() as connection:
            connection.execute(sa.update(ledger).values(retry_at=None))
        again = far_worker.claim()
        assert again is not None
        assert far_worker.execute(far_worker.start(again)).succeeded
        far_worker.heartbeats.dispose()


@contextmanager
def real_instance(
    engine: sa.Engine, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DagsterInstance]:
    """Dagster 的存储在 PostgreSQL 里，像工人那样打开。"""
    write_dagster_home(folder / "home")
    silenced = dagster_instance._CONSOLE_LOGGERS  # 打开实例会换掉它：之后换回来
    monkeypatch.setattr(context_creation_job, silenced, getattr(context_creation_job, silenced))
    monkeypatch.setenv("DAGSTER_HOME", str(folder / "home"))
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", build_dagster_postgres_url(url))
    create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=folder / "migrate.log")
    with open_instance() as instance:
        yield instance
