"""事件监听器：从 EVENTS 成批取事件，校验，交给处理器，敲门铃，最后才确认。"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nats.aio.msg import Msg

from bridge.events.event_task_utils import EventTaskHandler
from bridge.events.settling import Settler
from bridge.events.streams import consumer_name, ensure_event_streams
from bridge.events.verdicts import Failed, Judge, Verdict
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.headers import header_text
from bridge.jetstream.pull import Puller
from bridge.nats_names import EVENTS_STREAM
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

LANE: Lane = "event"
FINISH_SECONDS = 20.0
"""要求停下之后，手里那一批最多再做这么久；没确认的会重投。"""
REFUSED_PAUSE_SECONDS = 2.0
"""数据库谁也不让做时，隔这么久才取下一批。"""

Result = TypeVar("Result")
Ring = Callable[[str, Lane], Awaitable[None]]


class Listener:
    """每个主题一个持久消费者；同时开几个监听器，事件在它们之间分。"""

    def __init__(self, settings: BridgeSettings, *, handlers: Sequence[EventTaskHandler[Any]], ring: Ring) -> None:
        self._settings = settings
        self._ring = ring
        self._consumers = {
            subject: consumer_name(settings, subject) for subject in sorted(handler.subject for handler in handlers)
        }
        self._connection = JetStreamConnection(settings, name="listener")
        self._judge = Judge(settings, handlers)
        self._settler = Settler(settings, self._connection)
        self._puller = Puller(self._connection, EVENTS_STREAM, restore=self._ensure_streams)
        self._settling: asyncio.Task[None] | None = None
        self._cannot_ring = RepeatedWarning(logger, "cannot ring, trying again")

    async def run(self, stop: asyncio.Event) -> None:
        """监听到 stop 为止；NATS 中途断开不算错，开头连不上抛 BridgeError。"""
        await self._connection.open()
        stopping = asyncio.create_task(stop.wait())
        try:
            await self._ensure_streams()
            logger.info("ready", subjects=list(self._consumers))
            while not stop.is_set():
                await self._work(stopping)
            if self._settling is not None:
                await asyncio.wait({self._settling}, timeout=FINISH_SECONDS)
            # 在了结之后：要埋的信，了结时才开始埋
            await self._settler.finish(timeout_seconds=FINISH_SECONDS)
        finally:
            stopping.cancel()
            if self._settling is not None:
                self._settling.cancel()
            self._settler.stop()
            await self._connection.close()

    async def _ensure_streams(self) -> None:
        await ensure_event_streams(self._connection, self._settings, list(self._consumers))

    async def _work(self, stopping: asyncio.Task[Any]) -> None:
        """取一批、处理一批；要求停下时不再等新的，手里的做完。"""
        consumers, linger_seconds = list(self._consumers.values()), self._settings.listener_batch_milliseconds / 1000
        pulling = self._puller.wait(consumers, batch=self._settings.listener_batch_size, linger_seconds=linger_seconds)
        messages = await _until_stopping(pulling, stopping, patience_seconds=0) or []
        if stopping.done():
            # 先等服务器送完再拿：它正投着的没有人拿，就要等 ack_wait 才重投
            await self._puller.close()
        messages += self._puller.take_leftovers()
        if not messages:
            return
        if await _until_stopping(self._handle_batch(messages), stopping, patience_seconds=FINISH_SECONDS):
            await asyncio.wait({stopping}, timeout=REFUSED_PAUSE_SECONDS)

    # ---- 一批事件 ---------------------------------------------------------------

    async def _handle_batch(self, messages: Sequence[Msg]) -> bool:
        """次序是安全的全部：效果提交，门铃存下，然后才确认。返回数据库是不是一个也不让做。"""
        groups = defaultdict(list)
        for message in messages:
            groups[message.subject].append(message)
        async with self._connection.in_progress(messages, ack_wait_seconds=self._settings.event_ack_wait_seconds):
            verdicts = [
                verdict for subject, group in groups.items() for verdict in await self._judge.judge(subject, group)
            ]
            # 门铃响了才确认：反过来，死在两步之间，要求在台账里，却要等对账者想起它
            verdicts = await self._ring_doorbells(verdicts)
            # 在报平安的里面等：上一批了结得慢，这一批也不该被投给别人
            if self._settling is not None:  # 至多一批在了结
                await self._settling
        # 等服务器答应一千次确认的工夫，下一批可以进台账了
        self._settling = asyncio.create_task(self._settler.settle(verdicts))
        return all(verdict.wants_database for verdict in verdicts)

    async def _ring_doorbells(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """每个任务一批只敲一次；敲不响的那些事件稍后再来，不确认。"""
        failed: dict[str, Failed] = {}
        for task_name in sorted({verdict.task_name for verdict in verdicts if verdict.wants_ring}):
            try:
                await self._ring(task_name, LANE)
            except Exception as error:  # noqa: BLE001 门铃没存下就不能确认，原因不论
                self._cannot_ring.say(type(error).__name__, task=task_name, error=header_text(error))
                failed[task_name] = Failed(f"cannot ring {task_name}: {error}", "passing")
        return [
            replace(verdict, decision=failed[verdict.task_name])
            if verdict.wants_ring and verdict.task_name in failed
            else verdict
            for verdict in verdicts
        ]


async def _until_stopping(
    work: Coroutine[Any, Any, Result], stopping: asyncio.Task[Any], *, patience_seconds: float
) -> Result | None:
    """做 work；要求停下之后再给它 patience_seconds，做不完就取消，返回 None。"""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({task}, timeout=patience_seconds)
    finally:
        if not task.done():
            task.cancel()
            # 要等它真的结束：取消也许没赶上，那时它的结果照样算数
            await asyncio.wait({task})
    return None if task.cancelled() else task.result()
