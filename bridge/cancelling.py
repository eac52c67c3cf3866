"""取消 asyncio 的任务，等到它们真的结束。"""

from __future__ import annotations

import asyncio
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.5


async def cancel_all(*tasks: asyncio.Task[Any]) -> None:
    """一次取消不够：Python 3.11 的 wait_for 把与结果同时到的取消吞了，吞掉的循环就一直做下去，等它的也等下去。"""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
