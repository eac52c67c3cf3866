"""`etl init-db --create-indexes`：把应用的表上缺的索引一个一个建起来，不挡任何人读写；中断了的删掉重建。"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.database_errors import first_line, translated_errors
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.reports.lookups import IndexWork, find_index_work

PROGRESS_SECONDS = 5.0
_BUILD_LOCK = 0x45544F  # 同时只有一个在建
AGAIN = "run `etl init-db --create-indexes` again: it drops what is INVALID and goes on"

Say = Callable[[str], None]


def create_indexes(engine: sa.Engine, settings: EtlSettings, say: Say) -> int:
    """返回建了几个。建不成的说出来，接着建别的表的。

    :raises PermanentError: 还有缺的。
    """
    with translated_errors():
        built = _build_all(engine, settings, say)
        if remaining := transact(engine, find_index_work, settings):
            raise PermanentError(f"{len(remaining)} indexes are still missing or INVALID, see above; {AGAIN}")
    return built


def _build_all(engine: sa.Engine, settings: EtlSettings, say: Say) -> int:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.detach()  # 会话锁与会话设置随它去，不回连接池
        # 只试不等：等着的也握着快照，而 CONCURRENTLY 要等所有更早的快照
        if not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_BUILD_LOCK))):
            raise PermanentError("another `etl init-db --create-indexes` is at work on this database: wait for it")
        # 大表要几个小时；它自己不挡别人，等锁也就不必有限度
        connection.exec_driver_sql("SET statement_timeout = 0; SET lock_timeout = 0")
        work = transact(engine, find_index_work, settings)  # 用完就还：开着的事务会让 CONCURRENTLY 一直等它
        return sum(
            _build(engine, connection, each, say, f"{number} of {len(work)}") for number, each in enumerate(work, 1)
        )


def _build(engine: sa.Engine, connection: sa.Connection, work: IndexWork, say: Say, which: str) -> bool:
    if not work.is_buildable:
        say(work.says)
        return False
    try:
        for statement in work.statements:
            say(f"{which}: {statement}")
            with _reporting(engine, connection, say):
                connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        is_denied = isinstance(error.orig, psycopg.errors.InsufficientPrivilege)
        remedy = f"let {work.owner} run, one by one: {'; '.join(work.statements)}" if is_denied else AGAIN
        say(f"cannot build the index on {work.table_name} ({first_line(error.orig)}): {remedy}")
        return False
    return True


@contextmanager
def _reporting(engine: sa.Engine, connection: sa.Connection, say: Say) -> Iterator[None]:
    """期间隔一会儿说做到哪里；等着谁也说，那是别人没有结束的事务。"""
    pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    done = threading.Event()

    def report() -> None:
        with suppress(sa.exc.SQLAlchemyError):  # 说不出来也照样建
            while not done.wait(PROGRESS_SECONDS):
                with engine.connect() as another:
                    progress = another.execute(_PROGRESS, {"pid": pid}).first()
                if progress is not None:
                    share = f", {progress.share:.0%}" if progress.share is not None else ""
                    blocker = f" (process {progress.blocker})" if progress.blocker else ""
                    say(f"  {progress.phase}{blocker}{share}")

    reporter = threading.Thread(target=report, name="index-progress", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


_PROGRESS = sa.text("""
    SELECT phase, nullif(current_locker_pid, 0) AS blocker,
           coalesce(blocks_done::float / nullif(blocks_total, 0), tuples_done::float / nullif(tuples_total, 0)) AS share
    FROM pg_stat_progress_create_index WHERE pid = :pid AND phase IS NOT NULL""")
