"""把两个动作交错起来：一个停在它的某条语句之前，另一个趁这时做完，或被锁拦住。

停在哪里只看 SQL，不看产品里的函数名；等的是条件，不是时间。
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, get_ident
from time import monotonic, sleep
from typing import Any

import psycopg.errors
import sqlalchemy as sa

TIMEOUT_SECONDS = 60

Matches = Callable[[str], bool]


class WorkerDied(Exception):  # noqa: N818  # 不是错误：测试让工人死在这里
    """工人死在一条语句之前：事务没有提交。"""


def nth_statement(number: int) -> Matches:
    """认出第 number 条语句（从 1 起）；COPY 不经过 SQLAlchemy，不算。"""
    seen = 0

    def matches(_: str) -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    return matches


def writes_to(table: str, *, how: str = "INSERT INTO|UPDATE|DELETE FROM") -> Matches:
    """认出写这张表（schema.name）的语句。"""
    write = re.compile(rf"\b({how}) {re.escape(table)}\b")
    return lambda statement: write.search(statement) is not None


class Interleaving:
    """第一个动作与趁它停下时发生的别的动作。"""

    def __init__(self, engine: sa.Engine, pool: ThreadPoolExecutor, before: Matches) -> None:
        self._engine = engine
        self._pool = pool
        self._before = before
        self._first_thread: int | None = None
        self._reached, self._released = Event(), Event()
        self._dies = False
        self._actions: list[Future[Any]] = []

    def begin(self, action: Callable[[], Any]) -> bool:
        """开始第一个动作；它停下了是 True，没有走到那里就做完了是 False。"""

        def first() -> Any:
            self._first_thread = get_ident()
            try:
                return action()
            finally:
                self._first_thread = None

        running = self._start(first)
        wait_until(lambda: self._reached.is_set() or running.done())
        return self._reached.is_set()

    def meanwhile(self, action: Callable[[], Any]) -> Future[Any]:
        """开始另一个动作，直到它做完（`done()`），或被锁拦住。"""
        running = self._start(action)
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            wait_until(lambda: running.done() or is_anyone_waiting(connection))
        return running

    def resume(self, *, dies: bool = False) -> None:
        """第一个动作继续，或死在那里；等所有动作做完，有错就抛出。"""
        self.release(dies=dies)
        for running in self._actions:
            running.result(timeout=TIMEOUT_SECONDS)

    def release(self, *, dies: bool = False) -> None:
        self._dies = dies
        self._released.set()

    def _start(self, action: Callable[[], Any]) -> Future[Any]:
        self._actions.append(self._pool.submit(action))
        return self._actions[-1]

    def stop_here(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        """引擎的 before_cursor_execute：轮到那条语句就停下。"""
        if get_ident() != self._first_thread or self._reached.is_set() or not self._before(statement):
            return
        self._reached.set()
        assert self._released.wait(timeout=TIMEOUT_SECONDS)
        if self._dies:
            raise WorkerDied


@contextmanager
def interleaved(engine: sa.Engine, *, before: Matches) -> Iterator[Interleaving]:
    """第一个动作停在 `before` 认出的语句之前；离开时全都已做完。"""
    with ThreadPoolExecutor(4) as pool:
        both = Interleaving(engine, pool, before)
        sa.event.listen(engine, "before_cursor_execute", both.stop_here)
        try:
            yield both
        finally:
            both.release()
            pool.shutdown()
            sa.event.remove(engine, "before_cursor_execute", both.stop_here)


def is_anyone_waiting(connection: sa.Connection) -> bool:
    """这个数据库里有没有连接在等锁。"""
    waiting = sa.text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
    )
    return bool(connection.execute(waiting).scalar_one())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert monotonic() < deadline, "nothing happened"
        sleep(0.002)


@contextmanager
def giving_way(engine: sa.Engine) -> Iterator[Callable[[], bool]]:
    """给出一个函数：块里有没有语句因为别人锁着而不等就放弃过。"""
    given = Event()

    def look(context: sa.engine.ExceptionContext) -> None:
        if isinstance(context.original_exception, psycopg.errors.LockNotAvailable):
            given.set()

    sa.event.listen(engine, "handle_error", look)
    try:
        yield given.is_set
    finally:
        sa.event.remove(engine, "handle_error", look)
