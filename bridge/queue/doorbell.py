"""敲门铃的两种人：命令连上、敲一次、断开；网页与守护进程没有事件循环，自己的一个线程里跑着它，连接一直留着。"""

from __future__ import annotations

import asyncio
import threading

from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.errors import EtlError
from etl_assets.core.log import get_logger
from etl_assets.core.settings import read_settings

logger = get_logger(__name__)

# 人在网页前等着；敲不响也不要紧，工人几秒就看一遍排着队的运行
_PATIENCE_SECONDS = 3.0


async def ring_workers(settings: BridgeSettings, lane: Lane) -> None:
    """有到期的日子了：让一个工人来领。"""
    broker = SafeJetStreamBroker(settings)
    await broker.startup()
    try:
        await broker.ring(MATERIALIZE_DUE, lane)
    finally:
        await broker.shutdown()


class Doorbell:
    """用到才连 NATS。敲不响不算错：运行已经是 QUEUED，工人们自己会发现它。"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broker: SafeJetStreamBroker | None = None
        self._closing: asyncio.Task[None] | None = None

    def ring(self, run_id: str, lane: Lane) -> None:
        """让一个工人执行这个运行。"""
        ringing = asyncio.run_coroutine_threadsafe(self._ring(run_id, lane), self._running_loop())
        try:
            ringing.result(_PATIENCE_SECONDS)
        except (EtlError, TimeoutError) as error:
            logger.warning(
                "cannot ring the workers, the run stays queued",
                run_id=run_id,
                error=str(error) or "NATS does not answer",
            )

    async def _ring(self, run_id: str, lane: Lane) -> None:
        # 设置每次重新读：口令换了，旧的连接不是关闭了，就是拿着旧口令永远重连
        settings = read_settings(BridgeSettings)
        broker = self._broker
        if broker is None or broker.client.is_closed or broker.settings != settings:
            replaced, broker = broker, SafeJetStreamBroker(settings)
            await broker.startup()
            # 连上了才换：连不上的一留下来，以后每次点击都拿着它
            self._broker = broker
            if replaced is not None:
                # 旧的在旁边关：点击的人不等它
                self._closing = asyncio.create_task(replaced.shutdown())
        await broker.ring(EXECUTE_RUN, lane, run_id)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            # 网页的几个线程会同时来敲：不锁住，就各起一个循环、各连一次 NATS
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="doorbell", daemon=True).start()
            return self._loop
