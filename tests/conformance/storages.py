"""Dagster 的存储测试，接在一台真的 PostgreSQL 上；由 dagster_suites 在子进程里跑，每一种存储跑一遍。

测试的正文在 Dagster 的源码包里，这里只说用哪个存储：环境变量 STORAGE 是 stock（原样的）、lean（我们的，一个一个写）
或 batched（我们的，攒到有人读为止）。
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import sqlalchemy as sa
from dagster import DagsterEventType, DagsterInstance
from dagster._core import test_utils
from dagster._core.test_utils import instance_for_test
from dagster._utils.test.schedule_storage import TestScheduleStorage as ScheduleSuite

from bridge.warm_dagster import lean_events
from bridge.warm_dagster.instance import deferring_events
from bridge.warm_dagster.lean_storage import LeanStorage

test_utils.ensure_dagster_tests_import = lambda: None  # 它要测试装在 dagster 旁边，我们的在 PYTHONPATH 上

from dagster_postgres_tests import test_daemon_cursor_storage, test_event_log, test_run_storage  # noqa: E402
from dagster_tests.storage_tests.utils import partition_status_cache  # noqa: E402

STORAGE = os.environ["STORAGE"]
_CREATED: dict[str, tuple[set[str], frozenset[str]]] = {}
ScheduleSuite.__test__ = False


@contextmanager
def opened_instance(url: str) -> Iterator[DagsterInstance]:
    """空的库；原样的，或者像工人那样换成我们的。"""
    empty_tables(url)
    with instance_for_test(overrides=overrides(url) if STORAGE == "stock" else lean_overrides(url)) as instance:
        with deferring_events(instance) if STORAGE == "batched" else nullcontext():
            yield instance
        if STORAGE != "stock":
            instance.run_storage._engine.dispose()


def empty_tables(url: str) -> None:
    """清空而不重建：每个测试各建一次表要几秒。编号要从头数起；有测试动过表的，就从空的 schema 重来。"""
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        tables = set(sa.inspect(connection).get_table_names())
        if tables and (tables, marks_of(connection)) == _CREATED.get(url):
            kept = {"alembic_version", "secondary_indexes"}
            connection.exec_driver_sql(f"TRUNCATE {', '.join(sorted(tables - kept))} RESTART IDENTITY CASCADE")
            return
        schema = connection.scalar(sa.text("SELECT current_schema()"))
        connection.execute(sa.schema.DropSchema(schema, cascade=True))
        connection.execute(sa.schema.CreateSchema(schema))
    with instance_for_test(overrides=overrides(url)):
        pass
    with engine.begin() as connection:
        _CREATED[url] = set(sa.inspect(connection).get_table_names()), marks_of(connection)


def marks_of(connection: sa.Connection) -> frozenset[str]:
    """Dagster 记下的、做过了的迁移。"""
    if not sa.inspect(connection).has_table("secondary_indexes"):
        return frozenset()
    return frozenset(connection.scalars(sa.text("SELECT name FROM secondary_indexes")))


def overrides(url: str) -> dict[str, object]:
    return {"storage": {"postgres": {"postgres_url": url}}}


def lean_overrides(url: str) -> dict[str, object]:
    own = {"module": LeanStorage.__module__, "class": LeanStorage.__name__, "config": {"postgres_url": url}}
    return {"storage": {"custom": own}}


@pytest.fixture(autouse=True)
def _everything_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """平时只有运行自己会读的才先写下；这里谁来读都先写下。"""
    if STORAGE == "batched":
        monkeypatch.setattr(lean_events, "_READ_BACK", {None, *DagsterEventType})


@pytest.fixture
def conn_string() -> str:
    return os.environ["STORAGE_URL"]


@pytest.fixture(name="instance")
def lean_instance(conn_string: str) -> Iterator[DagsterInstance]:
    with opened_instance(conn_string) as instance:
        yield instance


class TestEventLog(test_event_log.TestPostgresEventLogStorage):
    @pytest.fixture(name="instance")
    def instance(self, conn_string: str) -> Iterator[DagsterInstance]:
        with opened_instance(conn_string) as instance:
            yield instance


class TestRuns(test_run_storage.TestPostgresRunStorage):
    @pytest.fixture(name="instance")
    def instance(self, conn_string: str) -> Iterator[DagsterInstance]:
        with opened_instance(conn_string) as instance:
            yield instance


class TestStatusCache(partition_status_cache.TestPartitionStatusCache):
    @pytest.fixture(name="instance")
    def instance(self, conn_string: str) -> Iterator[DagsterInstance]:
        with opened_instance(conn_string) as instance:
            yield instance


class TestDaemonCursors(test_daemon_cursor_storage.TestDaemonCursorStorage):
    __test__ = True

    @pytest.fixture(name="storage")
    def cursor_storage(self, instance: DagsterInstance) -> object:
        return instance.run_storage


class TestSchedules(ScheduleSuite):
    __test__ = True

    @pytest.fixture(name="storage")
    def schedule_storage(self, instance: DagsterInstance) -> object:
        return instance.schedule_storage
