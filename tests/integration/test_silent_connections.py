"""哑了的连接：两头都在等对方的切断，真在做的、停下来的、问不到的不动。都在真的 PostgreSQL 前面的网线上。"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from bridge.stack.dagster_home import build_dagster_postgres_url
from etl_assets.core import silent_connections
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseUnavailableError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.silent_connections import SilenceWatch
from tests.chaos.network import Link, Network

LOCK = sa.text("SELECT pg_advisory_xact_lock(7)")
CUT_SECONDS = 5.0
"""放低了的耐心之下，哑了的连接至迟这时已经切断；忙的机器也够。"""
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


def drop_while_waiting(network: Network, link: Link, engine: sa.Engine, work: Callable[[], Future[Any]]) -> Future[Any]:
    """让 work 的语句等着一把锁，线哑了，锁才放开：服务器做完了，回答没有到。"""
    with engine.begin() as connection:
        connection.execute(LOCK)
        future = work()
        with engine.connect() as other:
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            until(lambda: other.scalar(waiting))
        network.drop(link)
    return future


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
    network: Network, link: Link, engine: sa.Engine, far: sa.Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with far.connect() as one, far.connect() as two:
        one.scalar(sa.text("SELECT 1"))
        two.scalar(sa.text("SELECT 1"))
    silent = drop_while_waiting(network, link, engine, lambda: pool.submit(ask, far))
    with pytest.raises(DatabaseUnavailableError):
        silent.result(CUT_SECONDS)
    monkeypatch.setattr(silent_connections, "PATIENCE_SECONDS", 600)
    with far.connect() as one, far.connect() as two:
        assert pool.submit(lambda: [one.scalar(sa.text("SELECT 1")), two.scalar(sa.text("SELECT 1"))]).result(CUT_SECONDS) == [1, 1]


def test_ping_of_an_idle_connection_that_fell_silent_is_cut_and_a_new_connection_is_lent(
    network: Network, link: Link, far: sa.Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etl_assets.core.database_sync._IDLE_SECONDS", 0)
    assert ask(far, sa.text("SELECT 1")) == 1
    network.drop(link)
    assert pool.submit(ask, far, sa.text("SELECT 2")).result(CUT_SECONDS) == 2


def test_copy_whose_last_words_are_swallowed_is_cut(network: Network, link: Link, far: sa.Engine, pool: ThreadPoolExecutor) -> None:
    def copy() -> None:
        with translated_errors(), far.begin() as connection:
            driver: Any = connection.connection.driver_connection
            driver.execute("CREATE TEMPORARY TABLE staged (n int)")
            with driver.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as writing:
                writing.write("1\n")
                network.drop(link)
                time.sleep(0.2)

    with pytest.raises(DatabaseUnavailableError):
        pool.submit(copy).result(CUT_SECONDS)


def test_statement_that_works_or_waits_for_a_lock_is_left_alone(engine: sa.Engine, far: sa.Engine, pool: ThreadPoolExecutor) -> None:
    working = pool.submit(ask, far, sa.text(f"SELECT 'done' FROM pg_sleep({LONG_SECONDS})"))
    with engine.begin() as connection:
        connection.execute(LOCK)
        waiting = pool.submit(ask, far)
        assert working.result(CUT_SECONDS) == "done"
    waiting.result(CUT_SECONDS)


@pytest.mark.parametrize(
    "statement", ["COPY staged FROM STDIN", "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT"]
)
def test_copy_in_which_the_client_pauses_is_left_alone(far: sa.Engine, statement: str) -> None:
    with far.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("CREATE TEMPORARY TABLE staged (n int)")
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            if "FROM STDIN" in statement:
                copy.write("1\n")
                time.sleep(LONG_SECONDS)
                copy.write("2\n")
            else:
                assert copy.read()
                time.sleep(LONG_SECONDS)
                assert sum(1 for _ in copy) == 19_999
        assert connection.scalar(sa.text("SELECT count(*) FROM staged")) == (2 if "FROM STDIN" in statement else 0)


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


def test_engine_with_a_limit_waits_no_longer_whatever_the_server_does(
    far_settings: EtlSettings, engine: sa.Engine, pool: ThreadPoolExecutor
) -> None:
    impatient = build_engine(far_settings, longest_wait_seconds=0.5)
    with engine.begin() as connection:
        connection.execute(LOCK)
        with pytest.raises(DatabaseUnavailableError):
            pool.submit(ask, impatient).result(CUT_SECONDS)
    impatient.dispose()


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
def test_kernel_gives_up_a_peer_that_acknowledges_nothing(far: sa.Engine, far_settings: EtlSettings, driver: str) -> None:
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
