"""进程旁边的活（对账、补发……）：没有一件会无声地结束；出了错写进日志与 etl.troubles，隔一会儿再起来。"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable

import structlog

from etl_assets.core.backoff import Backoff, failures_in_a_row
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.ledger.troubles import note_trouble

logger = get_logger(__name__)

RESTART = Backoff(first_seconds=1.0, longest_seconds=60.0)
_NOTE_SECONDS = 5.0

_ended = RepeatedWarning(logger, "a task beside the work ended, starting it again", level="error")


async def supervised(name: str, work: Callable[[], Awaitable[None]], *, stop: asyncio.Event | None = None) -> None:
    """一直做 work；它结束了、抛错了就写下来再起，隔得越来越久。

    :param stop: 要求停下之后它才该自己结束；None 表示只有取消能停下它。
    """
    failures = 0
    while stop is None or not stop.is_set():
        started_at = time.monotonic()
        error: Exception | None = None
        try:
            await work()
        except asyncio.CancelledError:  # 它里面的什么被别人取消了，不是要我们停
            if (own := asyncio.current_task()) is None or own.cancelling():
                raise
            error = RuntimeError("something that it waited for was cancelled")
        except Exception as raised:  # noqa: BLE001  # 它抛什么都不能无声地结束
            error = raised
        if stop is not None and stop.is_set() and error is None:
            return
        failures = failures_in_a_row(failures, lived_seconds=time.monotonic() - started_at)
        pause_seconds = RESTART.seconds(failures)
        message = f"{type(error).__name__}: {error}" if error else "it ended without an error"
        _ended.say(
            f"{name} {type(error).__name__}", task=name, error=message, restart_in_seconds=pause_seconds, exc_info=error
        )
        await _write_down(name, message)
        await pause(pause_seconds, stop)


def start_beside(name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """在旁边起一件活，直到被取消。"""
    return asyncio.create_task(supervised(name, work), name=name)


async def _write_down(name: str, message: str) -> None:
    """数据库也许正是出了事的那个：写不下就算了，日志里有。"""
    component = structlog.contextvars.get_contextvars().get("component", "process")
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_NOTE_SECONDS):
            process = f"{component}@{socket.gethostname()}"
            await asyncio.to_thread(transact, get_engine(), note_trouble, process=process, task=name, message=message)


async def pause(seconds: float, stop: asyncio.Event | None) -> None:
    """等这么久，要求停下了就不再等。"""
    if stop is None:
        await asyncio.sleep(seconds)
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
