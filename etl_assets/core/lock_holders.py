"""等锁等过了期限，错误里说出是谁占着：人忘了提交的会话，要有人去结束它。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.database_errors import DATABASE_ERRORS
from etl_assets.core.etl_tables import etl
from etl_assets.core.settings import EtlSettings

# 占着行锁的，总也占着那张表。别的角色开始的时刻，要 pg_read_all_stats 才看得到：那就不知道有多久
_HOLDER = sa.text("""
    SELECT session.pid, session.usename, session.application_name, session.state,
        extract(epoch FROM clock_timestamp() - session.xact_start)::int AS seconds
    FROM pg_locks AS held
    JOIN pg_class AS of_table ON of_table.oid = held.relation
    JOIN pg_stat_activity AS session ON session.pid = held.pid
    WHERE held.locktype = 'relation' AND held.granted AND held.mode <> 'AccessShareLock'
        AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND of_table.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN (:of_etl, :of_target))
        AND coalesce(session.xact_start <= clock_timestamp() - make_interval(secs => :seconds), true)
    ORDER BY session.xact_start
    LIMIT 1
""")


@contextmanager
def naming_holder(engine: sa.Engine, settings: EtlSettings) -> Iterator[None]:
    """块里等锁等过了 ETL_LOCK_TIMEOUT_SECONDS 的，给驱动的错误记上占着它们最久的那个会话（`translate` 会说出来）。"""
    started_at = time.monotonic()
    try:
        yield
    except sa.exc.OperationalError as error:
        # 不等就放弃的（NOWAIT）还会再来，不是等过了
        has_waited = time.monotonic() - started_at >= settings.lock_timeout_seconds
        if has_waited and isinstance(error.orig, psycopg.errors.LockNotAvailable):
            with suppress(*DATABASE_ERRORS):
                if holder := _name_holder(engine, settings):
                    error.orig.add_note(holder)
        raise


def _name_holder(engine: sa.Engine, settings: EtlSettings) -> str | None:
    asked = {"of_etl": etl.schema, "of_target": settings.target_schema, "seconds": settings.lock_timeout_seconds}
    with engine.connect() as connection:
        row = connection.execute(_HOLDER, asked).first()
    if row is None:
        return None
    how_long = "" if row.seconds is None else f" for {row.seconds} s, {row.state}"
    return (
        f"session {row.pid} ({row.application_name or 'no name'} of {row.usename}) has held locks{how_long}: "
        f"if it is forgotten, SELECT pg_terminate_backend({row.pid})"
    )
