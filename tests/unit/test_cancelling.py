"""吞了一次取消的任务也停得下来：nats-py 的请求在 Python 3.11 上就会吞。"""

from __future__ import annotations

import asyncio

from bridge.cancelling import cancel_all


async def test_task_that_swallows_a_cancellation_is_stopped() -> None:
    swallowed = 0

    async def work() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed += 1

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_all(task)
    assert task.cancelled()
    assert swallowed == 1
