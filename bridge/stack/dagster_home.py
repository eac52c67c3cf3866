"""DAGSTER_HOME：生成的 dagster.yaml 与 workspace.yaml，以及 Dagster 存储所在的 schema。"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from psycopg import sql

from bridge.warm_dagster.code_location_name import LOCATION_NAME
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import RELIED_ON, normalize_url, session_options
from etl_assets.core.errors import DatabaseRefusedError
from etl_assets.core.silent_connections import libpq_patience
from etl_assets.embedded.child_log import ChildStartError, open_log, read_last_line
from etl_assets.embedded.child_process import launch
from etl_assets.embedded.private_folder import create_private_folder, write_private_file

DAGSTER_SCHEMA = "dagster"
_MAINTENANCE_DATABASE = "postgres"
# 连不上时 libpq 不给 SQLSTATE：是不是没有这个数据库，只有看它的话
_NO_DATABASE = re.compile(r'database ".*" does not exist')
_MIGRATION_LOCK = 0x444147  # "DAG"：两个栈用同一个数据库时排队


def build_dagster_postgres_url(database_url: str, *, schema: str = DAGSTER_SCHEMA) -> str:
    """同一个数据库里 Dagster 的 schema；驱动要写明，因为 dagster-postgres 用 psycopg2。"""
    url = normalize_url(database_url).set(drivername="postgresql+psycopg2")
    given = url.query.get("options", ())
    options = [
        *([given] if isinstance(given, str) else given),
        session_options({**RELIED_ON, "search_path": f'"{schema}"'}),
    ]
    patience = {name: str(value) for name, value in libpq_patience(url).items()}
    return url.update_query_dict({"options": " ".join(options), **patience}).render_as_string(hide_password=False)


def check_dagster_database(url: str) -> None:
    """:raises EtlError: 连不上 DAGSTER_POSTGRES_URL，一句话。"""
    with translated_errors(), _connect(sa.make_url(url)):
        pass


def ensure_dagster_database(url: str) -> bool:
    """DAGSTER_POSTGRES_URL 的数据库，没有就建；返回建了没有。它的表由 `dagster instance migrate` 建。

    :raises EtlError: 连不上，或者没有建它的权限。
    """
    try:
        check_dagster_database(url)
    except DatabaseRefusedError as error:
        if not _NO_DATABASE.search(str(error)):
            raise
    else:
        return False
    wanted = sa.make_url(url)
    with translated_errors(), _connect(wanted.set(database=_MAINTENANCE_DATABASE)) as connection:
        connection.exec_driver_sql(
            f"CREATE DATABASE {connection.dialect.identifier_preparer.quote(str(wanted.database))}"
        )
    return True


@contextmanager
def _connect(url: sa.URL) -> Iterator[sa.Connection]:
    engine = sa.create_engine(
        url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args=libpq_patience(url)
    )
    with engine.connect() as connection:
        yield connection


def write_dagster_home(folder: Path) -> None:
    """没有口令：地址来自环境变量 DAGSTER_POSTGRES_URL。JSON 也是 YAML。"""
    create_private_folder(folder)
    document = {
        "storage": {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}},
        "run_coordinator": {"module": "bridge.run_coordinator", "class": "TaskQueueRunCoordinator"},
        "run_launcher": {"module": "bridge.run_launcher", "class": "WarmRunLauncher"},
        # 截取标准输出要起两个进程、重定向整个进程的文件描述符；运行在常驻的工人里，输出在工人的日志里
        "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"},
        "local_artifact_storage": {
            "module": "dagster._core.storage.root",
            "class": "LocalArtifactStorage",
            "config": {"base_dir": str(folder / "artifacts")},
        },
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
    }
    write_private_file(folder / "dagster.yaml", json.dumps(document, indent=2))


def write_workspace(path: Path, *, code_server_port: int) -> None:
    server = {"host": "127.0.0.1", "port": code_server_port, "location_name": LOCATION_NAME}
    write_private_file(path, json.dumps({"load_from": [{"grpc_server": server}]}, indent=2))


def create_dagster_storage(engine: sa.Engine, *, schema: str, environment: Mapping[str, str], log_path: Path) -> None:
    """建立或升级 Dagster 的表，由一个进程先做完：几个 Dagster 进程同时第一次启动会抢着建表。

    已经是这一版就不再花导入 Dagster 的两三秒；版本记在 schema 的注释里。
    """
    version = f"dagster {importlib.metadata.version('dagster')}"
    with engine.connect() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATION_LOCK)))
        connection.detach()  # 会话锁随连接关闭而释放
        if not sa.inspect(connection).has_schema(schema):
            connection.execute(sa.schema.CreateSchema(schema))
        connection.commit()
        comment_of = sa.text("SELECT obj_description(CAST(quote_ident(:schema) AS regnamespace), 'pg_namespace')")
        found = connection.scalar(comment_of, {"schema": schema})
        connection.commit()
        if found == version:
            return
        # 此刻没有开着的事务：闲得太久的事务会被服务器断开，锁也随着没了
        _migrate(environment, log_path)
        # 升级成了才写版本：死在半路的，下一次启动再升级一遍
        comment = sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(schema), sql.Literal(version))
        connection.exec_driver_sql(comment.as_string())
        connection.commit()


def _migrate(environment: Mapping[str, str], log_path: Path) -> None:
    with open_log(log_path) as log:
        start = log.tell()
        process = launch([sys.executable, "-P", "-m", "dagster", "instance", "migrate"], log, env=environment)
        try:
            exit_code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            exit_code = process.wait()
    if exit_code != 0:
        raise ChildStartError(name="dagster-storage", log=log_path, reason=read_last_line(log_path, start))
