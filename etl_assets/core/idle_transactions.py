"""开着的事务等着别处的活（另一条连接上的读与数、Polars）时，服务器不因为它闲着而切断它。"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
import sqlalchemy as sa
from psycopg.generators import execute
from psycopg.pq import TransactionStatus

from etl_assets.core.settings import EtlSettings
from etl_assets.core.silent_connections import WatchedConnection

_LOOK_SECONDS = 0.3  # 小于 idle_in_transaction_session_timeout 的最小值 1 秒


@contextmanager
def kept_alive(connection: sa.Connection, settings: EtlSettings) -> Iterator[None]:
    """块里，事务一闲着就替它问服务器一声。

    冻住的进程问不了，它的锁照样到时放开。线程卡住而进程还活着的，没有人用过事务 ETL_STATEMENT_TIMEOUT_SECONDS 之后
    也不再问：别处的一条语句最多就这么久。
    """
    driver = connection.connection.driver_connection
    if not isinstance(driver, WatchedConnection):
        raise TypeError(f"{type(driver).__name__} is no connection of the one engine")
    keeper = _keepers.setdefault(os.getpid(), _Keeper())  # fork 出来的进程不碰父进程的连接
    keeper.add(_Kept(driver, settings.statement_timeout_seconds))
    try:
        yield
    finally:
        keeper.remove(driver)


class _Kept:
    """一条照看着的连接。"""

    def __init__(self, driver: WatchedConnection, limit_seconds: float) -> None:
        self.driver = driver
        self._limit_seconds = limit_seconds
        self._waits, self._used_at = driver.waits, time.monotonic()

    def look(self) -> None:
        """正用着的不问，COPY 的间隙里也不问；锁着的就是正用着，不等它：别的连接也要照看。"""
        if not self.driver.lock.acquire(blocking=False):
            self._used_at = time.monotonic()
            return
        try:
            if self.driver.waits != self._waits or not self._is_idle():
                self._used_at = time.monotonic()
            if self._is_idle() and time.monotonic() - self._used_at <= self._limit_seconds:
                with suppress(psycopg.Error):  # 断了的，用它的人自己会知道
                    # 不经游标：它的 execute 要拿的正是我们握着的这把锁
                    self.driver.pgconn.send_query(b"SELECT")
                    self.driver.wait(execute(self.driver.pgconn))
            self._waits = self.driver.waits
        finally:
            self.driver.lock.release()

    def _is_idle(self) -> bool:
        """状态变成空闲的那一刻，别的线程可能还在读 COPY 的结果：那时它还等着。"""
        return not self.driver.is_waiting and self.driver.info.transaction_status == TransactionStatus.INTRANS


class _Keeper:
    """一个进程的照看者：有事务要照看时才有它的线程。给每个事务起一个，一个小运行就要多花几毫秒。"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[WatchedConnection, _Kept] = {}
        self._thread: threading.Thread | None = None

    def add(self, kept: _Kept) -> None:
        with self._lock:
            self._kept[kept.driver] = kept
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._keep, name="keep-alive", daemon=True)
                self._thread.start()

    def remove(self, driver: WatchedConnection) -> None:
        """这时正问着也不要紧：用它的下一条语句等着同一把锁。"""
        with self._lock:
            del self._kept[driver]

    def _keep(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                kept = list(self._kept.values())
                if not kept:
                    self._thread = None
                    return
            for one in kept:
                one.look()


_keepers: dict[int, _Keeper] = {}
