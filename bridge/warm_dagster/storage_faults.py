"""Dagster 的存储在一个运行里出的错：Dagster 把它们变成文字存下，是谁的错要看原来的那一个。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import sqlalchemy as sa

_faults: ContextVar[list[Exception] | None] = ContextVar("storage_faults", default=None)


@contextmanager
def noting_faults() -> Iterator[list[Exception]]:
    """期间这个线程里存储抛出的，先抛的在前；别的线程（心跳写日志的）不算。"""
    faults: list[Exception] = []
    token = _faults.set(faults)
    try:
        yield faults
    finally:
        _faults.reset(token)


@contextmanager
def noted(connecting: AbstractContextManager[sa.Connection]) -> Iterator[sa.Connection]:
    """借一个连接，出了错就记下。"""
    try:
        with connecting as connection:
            yield connection
    except Exception as error:
        if (faults := _faults.get()) is not None:
            faults.append(error)
        raise
