"""任务队列：TaskIQ 跑在 JetStream 工作队列上。凡碰到 TaskIQ 内部的代码都在这个文件夹，由 test_taskiq_contract 看守。

三条车道（interactive > event > bulk）各是一个主题和一个消费者。一条消息只在有空位时才取，执行期间按时报平安，
任务结束之后才确认；失败的隔一会儿再来，毒消息与屡试不成的进死信流。
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from functools import cached_property
from typing import cast

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig
from taskiq import AckableMessage, AsyncBroker, BrokerMessage
from taskiq.exceptions import SendTaskError
from taskiq.kicker import AsyncKicker
from taskiq_nats import PullBasedJetStreamBroker

from bridge.errors import UnknownLaneError
from bridge.jetstream.client import NatsClient
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.pull import Puller
from bridge.jetstream.streams import ensure_consumer, ensure_stream, subject_counts
from bridge.nats_names import TASKS_STREAM, TASKS_SUBJECT
from bridge.queue.delivery import Delivery, TaskDelivery
from bridge.queue.streams import task_streams
from bridge.settings import LANES, BridgeSettings, Lane, get_bridge_settings
from etl_assets.core.errors import PermanentError
from etl_assets.core.log import get_logger

logger = get_logger(__name__)

DEFAULT_LANE: Lane = "bulk"

REMINDER_SECONDS = 10.0
"""同一件事的提醒，这么久之内只存一次。"""
SPARE_REMINDERS = 20
"""车道上的消息比要做的事多出这么多条，就不再提醒：有几条也许正等着重试，人不必跟着等。"""


class SafeJetStreamBroker(PullBasedJetStreamBroker):
    """不丢任务、不扣着任务不做的 broker。构造时什么也不连。"""

    def __init__(self, settings: BridgeSettings | None = None) -> None:
        """:param settings: None 表示启动时才读环境变量，好让模块里的 broker 对象导入时无副作用。"""
        super().__init__(servers=[], stream_name=TASKS_STREAM)
        self.client: NatsClient = NatsClient()  # type: ignore[misc]  # 在那里是 Final；它自己的不会等、也不问 TLS
        self._settings = settings
        self.in_hand: set[Delivery] = set()
        """取到手、尚未了结的任务。"""
        self.replacing = False
        """手里的任务了结之后换一个新的进程：它有一个线程停不下来。"""
        self.stopping = asyncio.Event()
        """这个进程该停下了：起不来而在等的，不必再等。"""
        self._returning: set[asyncio.Task[None]] = set()

    @cached_property
    def settings(self) -> BridgeSettings:
        return self._settings or get_bridge_settings()

    @cached_property
    def connection(self) -> JetStreamConnection:
        """startup 打开它；没打开就用的，它自己会说。"""
        return JetStreamConnection(
            self.settings, name="worker" if self.is_worker_process else "tasks", client=self.client
        )

    @cached_property
    def puller(self) -> Puller:
        stream = self.settings.own_name(TASKS_STREAM)
        return Puller(self.connection, stream, restore=self._ensure_queue, unwanted=self._return)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """本进程服务的车道，先执行的在前。"""
        wanted = self.settings.worker_lanes
        return tuple(lane for lane in LANES if lane in wanted or (lane == "event" and "small" in wanted))

    @property
    def takes_small_days_only(self) -> bool:
        """事件车道上的门铃只领小的日子，别的转给别人。"""
        wanted = self.settings.worker_lanes
        return "small" in wanted and "event" not in wanted

    # ---- 起止 ------------------------------------------------------------------

    async def startup(self) -> None:
        await self.connection.open()
        self.js = self.connection.context
        await self._ensure_queue()
        # 越过 taskiq-nats 的 startup：它的连接、流、消费者都不是我们要的
        await AsyncBroker.startup(self)

    async def _ensure_queue(self) -> None:
        for stream in task_streams(self.settings):
            await ensure_stream(self.connection, stream)
        if self.is_worker_process:
            for lane in self.lanes:
                await ensure_consumer(self.connection, self.settings.own_name(TASKS_STREAM), self._consumer(lane))

    def _consumer(self, lane: Lane) -> ConsumerConfig:
        return ConsumerConfig(
            durable_name=lane,
            filter_subject=f"{self.settings.own_name(TASKS_SUBJECT)}.{lane}",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self.settings.task_ack_wait_seconds,
            max_deliver=-1,  # 次数由我们数：服务器的上限会让消息无声地搁浅
            max_ack_pending=20_000,
            max_waiting=1_024,
        )

    async def shutdown(self) -> None:
        # 断线之前还：断了就还不了，手里的要等 ack_wait 才有人接
        await self._give_back_everything()
        await AsyncBroker.shutdown(self)
        await self.connection.close()
        del self.connection, self.puller  # 再 startup 就从头连起

    async def _give_back_everything(self) -> None:
        """没做完的现在就还，不必等 ack_wait。"""
        # 先不再取：归还之后才取到的，没有人还
        await self.puller.close()
        if not self.client.is_connected:
            return
        for message in self.puller.take_leftovers():
            self._return(message)
        # 正在还的也算在手里：等它们还完，才不会把同一条还两遍
        await asyncio.gather(*self._returning)
        await asyncio.gather(*(delivery.give_back() for delivery in list(self.in_hand)))

    # ---- 投递 ------------------------------------------------------------------

    async def kick(self, message: BrokerMessage) -> None:
        """存进任务流才返回；同一个任务编号只存一次。"""
        lane = str(message.labels.get("lane", DEFAULT_LANE))
        if lane not in LANES:
            raise UnknownLaneError(lane, LANES)
        # TaskIQ 重新排队时沿用任务的编号：不带上次数，会被当成重复的丢掉
        requeued = message.labels.get("X-Taskiq-requeue", 0)
        subject = f"{self.settings.own_name(TASKS_SUBJECT)}.{lane}"
        await self.connection.publish(subject, message.message, message_id=f"{message.task_id}:{requeued}")

    async def ring(self, task_name: str, lane: Lane, *arguments: str) -> None:
        """敲门铃：让某个 worker 执行 task_name；本进程不必认识这个任务。"""
        await self._kick(AsyncKicker(task_name, self, {"lane": lane}), arguments)

    async def remind(self, task_name: str, lane: Lane, *arguments: str) -> None:
        """门铃也许丢了，再敲一次；几个进程同时想起同一件事，也只存一条。

        编号里的时段让丢了的敲得响：流清空之后，NATS 照样记得清掉的编号。
        """
        purpose = ":".join((task_name, *arguments, str(int(time.time() // REMINDER_SECONDS))))
        await self._kick(AsyncKicker(task_name, self, {"lane": lane}).with_task_id(purpose), arguments)

    async def _kick(self, kicker: AsyncKicker[..., None], arguments: tuple[str, ...]) -> None:
        try:
            await kicker.kiq(*arguments)
        except SendTaskError as error:
            # TaskIQ 包了一层：敲门的人要分清 NATS 不在还是流满了
            raise error.__cause__ or error from None

    async def lane_depths(self) -> Counter[Lane]:
        """每条车道上有几条消息，做着的也算。"""
        prefix = f"{self.settings.own_name(TASKS_SUBJECT)}."
        counts = await subject_counts(self.connection, self.settings.own_name(TASKS_STREAM), f"{prefix}>")
        return Counter({lane: counts.get(prefix + lane, 0) for lane in LANES})

    # ---- 取任务 ----------------------------------------------------------------

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """TaskIQ 每有一个空位来要一条；给它的是现在最该做的那一条。"""
        logger.info("ready", lanes=list(self.lanes))
        while True:
            delivery = await self._next_delivery()
            # 先查不算数的再比：归还过许多次的，服务器数的次数早就超了
            await delivery.read_forgiven()
            # 执行之前就要数：会杀死进程的任务从来走不到了结那一步，只有这里拦得住它
            if delivery.attempt > self.settings.task_max_attempts:
                delivery.error = PermanentError(
                    "every delivery ended without an answer: worker killed, or frozen beyond the ack wait"
                )
                await delivery.settle()
            else:
                yield TaskDelivery(data=delivery.message.data, ack=lambda: None, delivery=delivery)

    async def _next_delivery(self) -> Delivery:
        """先按车道次序各看一眼；都空了才一起等。到手几条就做最急的，其余立刻还回去。"""
        while True:
            for lane in self.lanes:
                if message := await self.puller.take(lane):
                    return self._choose([message, *self.puller.take_leftovers()])
            if messages := await self.puller.wait(self.lanes):
                return self._choose(messages)

    def _choose(self, messages: Sequence[Msg]) -> Delivery:
        first, *others = sorted(messages, key=lambda message: LANES.index(cast("Lane", message.metadata.consumer)))
        for other in others:
            self._return(other)
        return self._hold(first)

    def _return(self, message: Msg) -> None:
        """来得不是时候的：手里正做着别的，让别的 worker 现在就拿去。"""
        task = asyncio.create_task(self._hold(message).give_back())
        # 要有人拿着它：asyncio 只弱引用任务，没有人拿着的可能还没还就被回收
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    def _hold(self, message: Msg) -> Delivery:
        return Delivery(message, self, self.connection, self.in_hand)
