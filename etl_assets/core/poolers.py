"""PostgreSQL 前面的连接池（pgbouncer）：按会话分的照常用，它丢了我们连上时的设置就再设一遍；按事务分的认出来，拒绝。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import make_conninfo

from etl_assets.core.errors import DatabaseRefusedError

NAME = "etl"
"""应用的名字，只在 options 里给：服务器连上时就报它，报的是它，options 就到了，不必问。"""
_ROUNDS = 10
_REFUSED = (
    "a connection pooler is between us and PostgreSQL and pools by transaction: temporary tables, prepared statements, locks and leases "
    "go astray; let it pool by session (pool_mode = session), or put PostgreSQL itself into ETL_DATABASE_URL"
)

Driver = psycopg.Connection[Any]


def live_with_poolers(engine: sa.Engine, settings: Mapping[str, str]) -> None:
    """:param settings: 连上时以 options 给的。"""

    # 先于 connect：按事务分的，一条设置也不留在它的会话里
    @sa.event.listens_for(engine, "first_connect")
    def _look(connection: Driver, _record: Any) -> None:
        try:
            if is_pooled(connection) and _mixes_sessions(connection):
                raise DatabaseRefusedError(_REFUSED)
            _settle(connection, settings)
        except Exception:
            connection.close()
            raise

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Driver, _record: Any) -> None:
        _settle(connection, settings)


def is_pooled(connection: Driver) -> bool:
    """中间有连接池：它给的会话号是编的。"""
    return _session(connection) != connection.info.backend_pid


def _settle(connection: Driver, settings: Mapping[str, str]) -> None:
    if connection.info.parameter_status("application_name") == NAME:
        return
    wanted = {**settings, "application_name": NAME}
    calls = ", ".join(["set_config(%s, %s, false)"] * len(wanted))
    values = [text for setting in wanted.items() for text in setting]
    connection.execute(f"SELECT {calls}", values, prepare=False)  # 只拼了个数
    connection.commit()


def _mixes_sessions(connection: Driver) -> bool:
    """两个连接轮流问：按会话分的各有一个会话，总是那一个；按事务分的，刚还回去的那一个给了另一个连接。"""
    own = _session(connection)
    given = connection.info
    address = make_conninfo(given.dsn, password=given.password)
    with psycopg.connect(address, autocommit=True) as other:
        return any(_session(other) == own or _session(connection) != own for _ in range(_ROUNDS))


def _session(connection: Driver) -> int:
    # 不预备：按事务分的连接池里，预备好的语句留在别人的会话里
    row = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    connection.rollback()
    return int(row[0]) if row else 0
