"""取消一个正在执行的运行：它下一条语句之前停下，正在执行的语句由服务器取消；事务随之回滚。

不往线程里抛异步异常：那会落在连接池的半途，留下坏掉的连接。ETL 的活不是 SQL 就是不到一秒的 Polars。
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from etl_assets.core.errors import RunCancelledError

if TYPE_CHECKING:  # 每个命令都要它，`etl --help` 也是
    import psycopg
    import sqlalchemy as sa

_CANCEL_SECONDS = 2.0
_RECORD_KEY = "interruption"


class Interruption:
    """一个运行的取消请求，连同它此刻借着的数据库连接。"""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[psycopg.Connection[Any]] = set()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def request(self) -> None:
        """要它停下；可以反复调用，直到它停下为止：两条语句之间的那一瞬没有东西可取消。"""
        self._requested.set()
        with self._lock:  # 归还连接也要这把锁：取消不会落到下一个借用者头上
            for connection in self._connections:
                connection.cancel_safe(timeout=_CANCEL_SECONDS)

    def add(self, connection: psycopg.Connection[Any]) -> None:
        with self._lock:
            self._connections.add(connection)

    def remove(self, connection: psycopg.Connection[Any]) -> None:
        with self._lock:
            self._connections.discard(connection)


current_interruption: ContextVar[Interruption | None] = ContextVar("current_interruption", default=None)
"""正在执行的运行的取消请求；没有（dagster dev、测试）时由 Dagster 自己处理。"""


def check_interruption() -> None:
    """不经 SQLAlchemy 的语句（COPY）之前调用。

    :raises RunCancelledError: 已经要求停下。
    """
    if (interruption := current_interruption.get()) and interruption.requested:
        raise RunCancelledError


def make_interruptible(engine: sa.Engine) -> None:
    """让这个引擎的每条语句之前都看一眼取消请求，借出的连接都记在借它的运行名下。"""

    from sqlalchemy import event

    @event.listens_for(engine, "before_cursor_execute")
    def _before(*_arguments: Any) -> None:
        check_interruption()

    @event.listens_for(engine, "checkout")
    def _checkout(connection: Any, record: Any, _proxy: Any) -> None:
        if interruption := current_interruption.get():
            interruption.add(connection)
            record.info[_RECORD_KEY] = interruption

    @event.listens_for(engine, "checkin")
    def _checkin(connection: Any, record: Any) -> None:
        if interruption := record.info.pop(_RECORD_KEY, None):
            interruption.remove(connection)
