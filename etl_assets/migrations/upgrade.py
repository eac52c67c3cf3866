"""`etl init-db` 的实现：新库建全部表；已有应用表的库只建 schema etl，别的一概不动。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError

from etl_assets.core.backoff import Backoff
from etl_assets.core.database_errors import driver_error, first_line, translate
from etl_assets.core.errors import DatabaseUnavailableError, PermanentError
from etl_assets.core.tables import APPLICATION_SCHEMA, application_tables

MINIMUM_SERVER_VERSION = 140000
VERSION_TABLE = "schema_version"
_UPGRADE_LOCK = 0x45544C  # "ETL"：两个 init-db 同时跑时排队
_ATTEMPTS = 8
_RETRY = Backoff(first_seconds=0.2, longest_seconds=5.0, spread=0.5)


def upgrade_database(engine: sa.Engine) -> bool:
    """升级到最新版本；返回是否新建了应用表。正用着这个库的与它死锁了就重来：全部迁移是一个事务，什么也没写。

    :raises DatabaseUnavailableError: 连不上，或服务器早于 PostgreSQL 14。
    :raises DatabaseRefusedError: 口令不对，没有这个库，或者只读。
    :raises PermanentError: 应用表只有一部分存在，或没有建表的权限。
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return _upgrade(engine)
        except (sa.exc.OperationalError, sa.exc.InternalError) as error:
            cause = driver_error(error)
            if not isinstance(cause, psycopg.errors.DeadlockDetected) or attempt == _ATTEMPTS:
                raise translate(cause) from error
            time.sleep(_RETRY.seconds(attempt))
        except sa.exc.ProgrammingError as error:
            raise PermanentError(
                f"cannot create the schema: {first_line(error.orig)}; the role needs CREATE on the database"
            ) from error


def _upgrade(engine: sa.Engine) -> bool:
    config = _config()
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SHOW server_version_num").scalar_one()
        if int(version) < MINIMUM_SERVER_VERSION:
            raise DatabaseUnavailableError(
                f"PostgreSQL server version {version} is too old: version {MINIMUM_SERVER_VERSION // 10000} or newer is needed"
            )
        connection.execute(sa.select(sa.func.pg_advisory_lock(_UPGRADE_LOCK)))
        connection.detach()  # 会话锁随连接关闭而释放，所以这个连接不回连接池
        expected = {table.name for table in application_tables()}
        existing = set(sa.inspect(connection).get_table_names(APPLICATION_SCHEMA)) & expected
        missing = expected - existing
        if existing and missing:
            raise PermanentError(
                f"the database has {', '.join(sorted(existing))} but not {', '.join(sorted(missing))}: "
                "create the missing application tables, or use an empty database"
            )
        connection.commit()
        config.attributes["connection"] = connection
        config.attributes["create_application_tables"] = not existing
        with _known_version():
            command.upgrade(config, "head")
        connection.commit()
        return not existing


def missing_migrations(engine: sa.Engine) -> list[str]:
    """还没做的迁移，先做的在前；没有就是最新的。"""
    scripts = ScriptDirectory.from_config(_config())
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "version_table_schema": "etl"}
        )
        current = context.get_current_revision()
    with _known_version():
        pending = [script.revision for script in scripts.iterate_revisions("head", current or "base")]
    return pending[::-1]


@contextmanager
def _known_version() -> Iterator[None]:
    """:raises PermanentError: 数据库是更新的版本建的。"""
    try:
        yield
    except (CommandError, ResolutionError) as error:
        raise PermanentError(
            f"schema etl was made by a newer version ({error}): install that version again, or a newer one"
        ) from error


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config
