"""只读的数据库：托管的故障切换与磁盘看守就这样做。旧会话断开，新会话什么也写不了，窗口关上以后也写不了。"""

from __future__ import annotations

import time
from contextlib import suppress

import sqlalchemy as sa
from psycopg import sql

from etl_assets.core.database_sync import normalize_url
from tests.other_sessions import end_other_sessions

_READ_ONLY = "default_transaction_read_only"


class ReadOnlySwitch:
    """一个数据库的开关；自己的会话写明可写，所以关得掉。"""

    def __init__(self, database_url: str) -> None:
        url = normalize_url(database_url)
        self._database = str(url.database)
        options = f"-c{_READ_ONLY}=off -cstatement_timeout=5s"
        connect_args = {"options": options, "connect_timeout": 3, "application_name": "read-only switch"}
        self._engine = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args=connect_args)

    def turn_on(self) -> None:
        """:raises sqlalchemy.exc.DBAPIError: 服务器正好不在。"""
        self._set("SET {} = on", end_sessions=True)

    def turn_off(self, *, patience_seconds: float = 120) -> None:
        """服务器不在就等它回来：窗口一定要关上。窗口里开的会话照旧开着，还是只读：不再用它们是各进程自己的事。"""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                self._set("RESET {}", end_sessions=False)
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def _set(self, action: str, *, end_sessions: bool) -> None:
        setting = sql.SQL(action).format(sql.Identifier(_READ_ONLY)).as_string()  # type: ignore[arg-type]  # 两个常量之一
        with self._engine.begin() as connection:
            alter = sql.SQL("ALTER DATABASE {} ").format(sql.Identifier(self._database)).as_string()
            connection.exec_driver_sql(alter + setting)
        if end_sessions:
            with suppress(sa.exc.DBAPIError), self._engine.begin() as connection:
                end_other_sessions(connection)
