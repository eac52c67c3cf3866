"""半路出的事：超时、断线、盘满、服务器重启。事务不留痕迹，错误说得出原因，同一个引擎上再做就成。"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.rows import TupleRow

from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import DatabaseUnavailableError, EtlError, TransientError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.customers import etl as customers_etl
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.leads import etl as leads_etl
from etl_assets.services.materialization import AssetReport
from etl_assets.testing.databases import initialize_database
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import ASSETS, Chain
from tests.integration.engine.snapshot import database_contents
from tests.the_three import graph

DAY = date(2026, 1, 5)
TIMEOUT_SECONDS = 30

# （资产，半路挡住它的表，锁）：ACCESS EXCLUSIVE 在 COPY 读出时就挡住，SHARE 让读过去、到写的时候才挡住
READING_ORDERS = ("orders", "public.raw_orders", "ACCESS EXCLUSIVE")
WRITING_ORDERS = ("orders", "public.orders", "SHARE")
ENDING_ORDERS = ("orders", "etl.outbox", "SHARE")
WRITING_CUSTOMERS = ("customers", "public.customers", "SHARE")
WRITING_LEADS = ("leads", "public.business_leads", "SHARE")

ACTIVITY = sa.table(
    "pg_stat_activity", *map(sa.column, ("pid", "datname", "xact_start", "query_start", "wait_event_type"))
)
OTHERS = sa.and_(ACTIVITY.c.datname == sa.func.current_database(), ACTIVITY.c.pid != sa.func.pg_backend_pid())
OPEN_TRANSACTIONS = sa.select(ACTIVITY.c.pid).where(OTHERS, ACTIVITY.c.xact_start.is_not(None))
BLOCKED = sa.select(ACTIVITY.c.pid).where(OTHERS, ACTIVITY.c.wait_event_type == "Lock")
LONG_BLOCKED = BLOCKED.where(ACTIVITY.c.query_start < sa.func.clock_timestamp() - timedelta(seconds=1.5))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """这个文件自己的服务器：可以停了再起，地址不变。"""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("faults") / "server", durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chain(server: EmbeddedPostgres) -> Iterator[Chain]:
    """一次导入已经做完；各个测试接着往下导入，不必每次从头来。"""
    settings = EtlSettings(database_url=server.start())
    engine = build_engine(settings)
    initialize_database(engine, graph)
    yield Chain(engine, settings)
    engine.dispose()


@pytest.fixture(scope="module")
def raw_data(chain: Chain) -> RawData:
    raw_data = RawData(chain.engine)
    chain.announce(raw_data.add_import([{}, {"order_id": "B"}, {"order_id": "C"}]))
    chain.run_due()
    return raw_data


@pytest.fixture(scope="module")
def impatient(chain: Chain) -> Iterator[Chain]:
    """同一个数据库，时限只有一两秒。"""
    settings = chain.settings.model_copy(update={"statement_timeout_seconds": 1, "idle_transaction_timeout_seconds": 2})
    engine = build_engine(settings)
    yield Chain(engine, settings)
    engine.dispose()


def announce_changes(chain: Chain, raw_data: RawData, asset: str) -> None:
    """又一次导入：改金额、换客户、修好一行又坏一行；做到 asset 之前为止。"""
    ((imports,),) = chain.rows(sa.select(sa.func.count()).select_from(import_tasks))
    rows: list[dict[str, Any]] = [
        {"amount": f"{imports}.00", "customer_name": f"客户{imports}"},
        {"order_id": "B", "quantity": -1 if imports % 2 else 1},
        {"order_id": "C", "order_status": "new" if imports % 2 else "completed"},
    ]
    chain.announce(raw_data.add_import(rows, completed_at=datetime(2026, 6, 1, tzinfo=UTC) + timedelta(hours=imports)))
    chain.run(DAY, assets=ASSETS[: ASSETS.index(asset)])


@contextmanager
def nothing_left_behind(chain: Chain) -> Iterator[None]:
    """块里的运行失败：库里的内容一点没变，没有开着的事务；之后同一个引擎把到期的做完，结果与参照实现一样。"""
    before, wanted = database_contents(chain.engine), chain.expected()
    yield
    wait_until(lambda: not chain.rows(OPEN_TRANSACTIONS))
    assert database_contents(chain.engine) == before
    assert chain.due_days() == [DAY]
    chain.run_due()
    chain.assert_converged(wanted)


@contextmanager
def locked(chain: Chain, table: str, mode: str) -> Iterator[None]:
    """另一个会话锁着这张表，直到块结束；那个会话自己断了也无妨。"""
    url = normalize_url(chain.settings.database_url).set(drivername="postgresql")
    holder = psycopg.connect(url.render_as_string(hide_password=False))
    try:
        holder.execute(f"LOCK TABLE {table} IN {mode} MODE".encode())
        yield
    finally:
        holder.close()


@contextmanager
def stopped_in_mid_load(
    chain: Chain, asset: str, table: str, mode: str
) -> Iterator[tuple[Future[list[AssetReport]], int]]:
    """一个运行在别的线程里等着这张表；给出它与它的后端的 pid。"""
    with ThreadPoolExecutor(1) as pool, locked(chain, table, mode):
        running = pool.submit(chain.run, DAY, assets=[asset])
        blocked: list[int] = []

        def is_blocked() -> bool:
            assert not running.done(), running.exception()
            blocked.extend(pid for (pid,) in chain.rows(BLOCKED))
            return bool(blocked)

        wait_until(is_blocked)
        yield running, blocked[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert monotonic() < deadline
        sleep(0.01)


# ---- 超时 ------------------------------------------------------------------------


@pytest.mark.parametrize(("asset", "table", "mode"), [READING_ORDERS, WRITING_CUSTOMERS])
def test_statement_that_takes_too_long_fails_the_run(
    impatient: Chain, raw_data: RawData, asset: str, table: str, mode: str
) -> None:
    announce_changes(impatient, raw_data, asset)
    with (
        nothing_left_behind(impatient),
        locked(impatient, table, mode),
        pytest.raises(EtlError, match=r"ETL_STATEMENT_TIMEOUT_SECONDS.*: canceling statement due to statement timeout"),
    ):
        impatient.run(DAY, assets=[asset])


def test_run_that_pauses_too_long_is_cut_off(chain: Chain, impatient: Chain, raw_data: RawData) -> None:
    announce_changes(impatient, raw_data, "orders")

    def pause_until_cut_off(_connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        if "etl.outbox" in statement:
            wait_until(lambda: not chain.rows(OPEN_TRANSACTIONS))

    with nothing_left_behind(impatient):
        sa.event.listen(impatient.engine, "before_cursor_execute", pause_until_cut_off)
        with pytest.raises(TransientError, match="ETL_IDLE_TRANSACTION_TIMEOUT_SECONDS"):
            impatient.run(DAY, assets=["orders"])
        sa.event.remove(impatient.engine, "before_cursor_execute", pause_until_cut_off)


@pytest.fixture(scope="module")
def hurried(chain: Chain) -> Iterator[Chain]:
    """同一个数据库，事务闲一秒就被切断。"""
    settings = chain.settings.model_copy(update={"idle_transaction_timeout_seconds": 1})
    engine = build_engine(settings)
    yield Chain(engine, settings)
    engine.dispose()


@pytest.mark.parametrize("table", ["public.raw_orders", "public.orders"], ids=["its snapshot", "its transaction"])
def test_run_that_waits_for_one_of_its_connections_does_not_pause_on_the_other(
    chain: Chain, hurried: Chain, raw_data: RawData, table: str
) -> None:
    """读得慢不是闲着：读的语句有自己的时限。快照等着写的连接时也一样。"""
    announce_changes(hurried, raw_data, "orders")
    try:
        with stopped_in_mid_load(hurried, "orders", table, "ACCESS EXCLUSIVE") as (running, _):
            wait_until(lambda: bool(chain.rows(LONG_BLOCKED)))
        running.result(TIMEOUT_SECONDS)
    finally:
        chain.run_due()


@contextmanager
def slow_imports(chain: Chain, statement: str) -> Iterator[None]:
    """import_tasks 是一个视图，文字里有 `statement` 的语句读它要一秒半。"""
    sleeping = f"SELECT pg_sleep(CASE WHEN current_query() LIKE '{statement}' THEN 1.5 ELSE 0 END)"
    slow = f"CREATE VIEW public.import_tasks AS SELECT * FROM tasks_of_app WHERE ({sleeping}) IS NOT NULL"  # noqa: S608  # 两段都是这里写的
    chain.execute(sa.text(f"ALTER TABLE import_tasks RENAME TO tasks_of_app; {slow}"))
    try:
        yield
    finally:
        chain.execute(sa.text("DROP VIEW public.import_tasks; ALTER TABLE tasks_of_app RENAME TO import_tasks"))


@pytest.mark.parametrize(
    "statement",
    ["COPY (SELECT public.import_tasks.%", "COPY (SELECT CASE%count(*)%"],
    ids=["numbering imports", "counting rows"],
)
def test_run_whose_snapshot_takes_long_does_not_pause(
    chain: Chain, hurried: Chain, raw_data: RawData, statement: str
) -> None:
    announce_changes(hurried, raw_data, "orders")
    wanted = chain.expected()
    with slow_imports(chain, statement):
        began = monotonic()
        hurried.run(DAY)
        assert monotonic() - began > 1.5
    chain.assert_converged(wanted)


@pytest.mark.parametrize("etl", [customers_etl, leads_etl], ids=["customers", "leads"])
def test_run_that_computes_for_long_does_not_pause(
    hurried: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, etl: ModuleType
) -> None:
    announce_changes(hurried, raw_data, "orders")
    compute = etl.transform

    def compute_slowly(*frames: object) -> object:
        sleep(1.5)
        return compute(*frames)

    monkeypatch.setattr(etl, "transform", compute_slowly)
    hurried.run(DAY)
    hurried.assert_converged()


# ---- 断线与重启 ------------------------------------------------------------------


@pytest.mark.parametrize(("asset", "table", "mode"), [READING_ORDERS, WRITING_ORDERS, WRITING_LEADS])
def test_ended_session_fails_the_run(chain: Chain, raw_data: RawData, asset: str, table: str, mode: str) -> None:
    announce_changes(chain, raw_data, asset)
    with nothing_left_behind(chain), stopped_in_mid_load(chain, asset, table, mode) as (running, backend):
        chain.rows(sa.select(sa.func.pg_terminate_backend(backend)))
        with pytest.raises(DatabaseUnavailableError, match="terminating connection due to administrator command"):
            running.result(TIMEOUT_SECONDS)


@pytest.mark.parametrize(("asset", "table", "mode"), [READING_ORDERS, ENDING_ORDERS])
def test_cut_line_fails_the_run(chain: Chain, raw_data: RawData, asset: str, table: str, mode: str) -> None:
    """服务器那边要到写回结果时才知道；那时它放弃事务。"""
    announce_changes(chain, raw_data, asset)
    connections: set[psycopg.Connection[TupleRow]] = set()

    def remember(connection: psycopg.Connection[TupleRow], *_: object) -> None:
        connections.add(connection)

    with nothing_left_behind(chain):
        sa.event.listen(chain.engine, "checkout", remember)
        with stopped_in_mid_load(chain, asset, table, mode) as (running, _):
            sa.event.remove(chain.engine, "checkout", remember)
            for connection in connections:
                with socket.socket(fileno=os.dup(connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)
            with pytest.raises(DatabaseUnavailableError, match="server closed the connection unexpectedly"):
                running.result(TIMEOUT_SECONDS)


def test_crash_of_the_server_fails_the_run(chain: Chain, raw_data: RawData) -> None:
    """一个后端被 kill -9，服务器就断开所有会话，自己恢复。"""
    announce_changes(chain, raw_data, "orders")
    with nothing_left_behind(chain):
        with stopped_in_mid_load(chain, *ENDING_ORDERS) as (running, backend):
            os.kill(backend, signal.SIGKILL)
            with pytest.raises(DatabaseUnavailableError, match="what was not committed is undone"):
                running.result(TIMEOUT_SECONDS)
        wait_until(lambda: can_connect(chain))


def can_connect(chain: Chain) -> bool:
    try:
        chain.rows(sa.select(sa.literal(1)))
    except sa.exc.OperationalError:
        return False
    return True


@pytest.mark.parametrize(("asset", "table", "mode"), [WRITING_ORDERS, WRITING_CUSTOMERS])
def test_restart_of_the_server_fails_the_run(
    chain: Chain, raw_data: RawData, server: EmbeddedPostgres, asset: str, table: str, mode: str
) -> None:
    announce_changes(chain, raw_data, asset)
    with nothing_left_behind(chain):
        # 服务器走之前的那句话，读到它之前连接可能已经断了
        gone = "terminating connection due to administrator command|server closed the connection unexpectedly"
        try:
            with stopped_in_mid_load(chain, asset, table, mode) as (running, _):
                server.stop()
                with pytest.raises(DatabaseUnavailableError, match=gone):
                    running.result(TIMEOUT_SECONDS)
            with pytest.raises(DatabaseUnavailableError, match="cannot reach the PostgreSQL of ETL_DATABASE_URL"):
                chain.run(DAY, assets=[asset])
        finally:
            server.start()


# ---- 盘满 ------------------------------------------------------------------------


@contextmanager
def full_disk(chain: Chain, server: EmbeddedPostgres, table: str) -> Iterator[None]:
    """这张表清空，文件换成 /dev/full：写它时内核真的答 ENOSPC，不需要任何特权。块结束时换回普通的文件。"""
    chain.execute(sa.text(f"TRUNCATE {table}"))
    ((path,),) = chain.rows(sa.select(sa.func.pg_relation_filepath(table)))
    chain.engine.dispose()  # 清空它的后端还开着原来的文件
    file = server.folder / "data" / path
    file.unlink()
    file.symlink_to("/dev/full")
    yield
    chain.execute(sa.text(f"TRUNCATE {table}"))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("asset", "table", "_"), [ENDING_ORDERS, WRITING_CUSTOMERS, WRITING_LEADS])
def test_full_disk_fails_the_run(
    chain: Chain, raw_data: RawData, server: EmbeddedPostgres, asset: str, table: str, _: str
) -> None:
    announce_changes(chain, raw_data, asset)
    with full_disk(chain, server, table):
        before = database_contents(chain.engine)
        with pytest.raises(
            TransientError, match=r"disk of the PostgreSQL server is full.*: could not extend file .*: No space left"
        ):
            chain.run(DAY, assets=[asset])
        assert database_contents(chain.engine) == before
    assert chain.due_days() == [DAY]
    chain.run_due()
    chain.assert_converged()
