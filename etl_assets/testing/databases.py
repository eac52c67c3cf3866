"""测试用的数据库：从一个迁移好的模板克隆，每个测试一个，用完即删。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine, normalize_url, transact
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import APPLICATION_SCHEMA
from etl_assets.definitions import graph
from etl_assets.ledger.graph import AssetGraph, write_graph
from etl_assets.migrations.upgrade import upgrade_database
from etl_assets.services.target_schema import prepare_target

_DROP_ATTEMPTS = 300


def database_url(server_url: str, name: str) -> str:
    """同一台服务器上另一个数据库的地址。"""
    return normalize_url(server_url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def template_database(server_url: str, assets: AssetGraph = graph) -> Iterator[str]:
    """建一个迁移到最新的模板数据库，给出它的名字。

    :param assets: 台账走的图；缺省是这份代码的。
    """
    name = f"etl_template_{uuid4().hex[:12]}"
    with _administer(server_url, create=f'CREATE DATABASE "{name}"', drop=name):
        engine = build_engine(EtlSettings(database_url=database_url(server_url, name)))
        initialize_database(engine, assets)
        engine.dispose()
        yield name


def initialize_database(engine: sa.Engine, assets: AssetGraph = graph) -> None:
    """像 init-db 那样。"""
    upgrade_database(engine)
    prepare_target(engine, EtlSettings())
    transact(engine, write_graph, APPLICATION_SCHEMA, assets)


@contextmanager
def cloned_database(server_url: str, template: str) -> Iterator[str]:
    """克隆模板，给出新数据库的地址。"""
    name = f"etl_test_{uuid4().hex[:12]}"
    # 照着文件抄，不经过 WAL：快一倍
    create = f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY'
    with _administer(server_url, create=create, drop=name):
        yield database_url(server_url, name)


@contextmanager
def _administer(server_url: str, *, create: str, drop: str) -> Iterator[None]:
    server = sa.create_engine(normalize_url(server_url), isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with server.connect() as connection:
        connection.exec_driver_sql(create)
    try:
        yield
    finally:
        with server.connect() as connection:
            _drop(connection, drop)


def _drop(connection: sa.Connection, name: str) -> None:
    """自动清理的进程正在里面时，普通角色赶不走它：等它走。"""
    for attempt in range(_DROP_ATTEMPTS):
        try:
            connection.exec_driver_sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        except sa.exc.ProgrammingError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege) or attempt == _DROP_ATTEMPTS - 1:
                raise
            time.sleep(0.1)
        else:
            return
