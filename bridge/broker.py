"""任务队列：TaskIQ 跑在 JetStream 工作队列上。凡碰到 TaskIQ 内部的代码都在这里，由 test_taskiq_contract 看守。

三条车道（interactive > event > bulk）各是一个主题和一个消费者。一条消息只在有空位时才取，执行期间按时报平安，
任务结束之后才确认；失败的隔一会儿再来，毒消息与屡试不成的进死信流。
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, cast

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig
from nats.js.errors import NotFoundError
from pydantic import ConfigDict
from taskiq import AckableMessage, AsyncBroker, BrokerMessage, TaskiqMessage, TaskiqResult
from taskiq.acks import AckController, AcknowledgeType
from taskiq.exceptions import NoResultError, SendTaskError, TaskRejectedError
from taskiq.kicker import AsyncKicker
from taskiq.receiver import Receiver
from taskiq_nats import PullBasedJetStreamBroker

from bridge.errors import BridgeError, StreamFullError, UnknownLaneError, is_transient
from bridge.jetstream import LETTERS_FULL_REMEDY, MESSAGE_NOT_FOUND, DeadLetterHeader, JetStreamConnection, header_text
from bridge.pull import Puller
from bridge.settings import LANES, BridgeSettings, Lane, get_bridge_settings
from etl_assets.core.child_launcher import die_with
from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, PermanentError
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

TASKS_STREAM = "TASKS"
TASKS_DLQ_STREAM = "TASKS_DLQ"
TASKS_FORGIVEN_STREAM = "TASKS_FORGIVEN"
TASKS_SUBJECT = "tasks"
TASKS_DLQ_SUBJECT = "tasks_dlq"
TASKS_FORGIVEN_SUBJECT = "tasks_forgiven"
DEFAULT_LANE: Lane = "bulk"
RETRY_SECONDS = (1.0, 5.0, 30.0, 120.0)
"""第几次失败之后等多久；再往后都等最后一个。"""

REMINDER_SECONDS = 10.0
"""同一件事的提醒，这么久之内只存一次。"""
SPARE_REMINDERS = 20
"""车道上的消息比要做的事多出这么多条，就不再提醒：有几条也许正等着重试，人不必跟着等。"""
ORPHAN_GRACE_SECONDS = 2.0
"""启动我们的进程被杀了：手里的任务再做这么久，做不完就还。"""

_not_settled = RepeatedWarning(logger, "task not settled, it will be delivered again")
_cannot_give_back = RepeatedWarning(logger, "task not given back, it will be delivered again")
_letters_full = RepeatedWarning(logger, "the dead letters are full, tasks that belong there wait in their queue")

_DAY = 86_400
_MIB = 1 << 20


def task_streams(settings: BridgeSettings) -> list[StreamConfig]:
    """任务、死信、不算数的投递。"""
    own = settings.own_name
    return [
        # 满了就拒收，不丢已有的
        StreamConfig(
            name=own(TASKS_STREAM),
            subjects=[f"{own(TASKS_SUBJECT)}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            max_bytes=256 * _MIB,
            duplicate_window=600,
        ),
        task_letters(settings),
        StreamConfig(
            name=own(TASKS_FORGIVEN_STREAM),
            subjects=[f"{own(TASKS_FORGIVEN_SUBJECT)}.>"],
            max_msgs_per_subject=1,
            max_bytes=16 * _MIB,
            max_age=7 * _DAY,
        ),
    ]


def task_letters(settings: BridgeSettings) -> StreamConfig:
    """任务的死信。"""
    return StreamConfig(
        name=settings.own_name(TASKS_DLQ_STREAM),
        subjects=[f"{settings.own_name(TASKS_DLQ_SUBJECT)}.>"],
        discard=DiscardPolicy.NEW,
        max_bytes=64 * _MIB,
        duplicate_window=600,
    )


class SafeJetStreamBroker(PullBasedJetStreamBroker):
    """不丢任务、不扣着任务不做的 broker。构造时什么也不连。"""

    def __init__(self, settings: BridgeSettings | None = None) -> None:
        """:param settings: None 表示启动时才读环境变量，好让模块里的 broker 对象导入时无副作用。"""
        super().__init__(servers=[], stream_name=TASKS_STREAM)
        self._settings = settings
        self._lanes: tuple[Lane, ...] | None = None
        self.connection: JetStreamConnection
        self.puller: Puller
        self.held: set[Delivery] = set()
        """取到手、尚未了结的任务。"""
        self.replacing = False
        self.stopping = asyncio.Event()
        """这个进程该停下了：起不来而在等的，不必再等。"""
        self._returning: set[asyncio.Task[None]] = set()

    @property
    def settings(self) -> BridgeSettings:
        if self._settings is None:
            self._settings = get_bridge_settings()
        return self._settings

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """本进程服务的车道，先执行的在前。"""
        wanted = self._lanes or self.settings.worker_lanes
        return tuple(lane for lane in LANES if lane in wanted)

    def serve_only(self, lanes: tuple[Lane, ...]) -> None:
        """只服务这些车道；在启动之前调用。"""
        for lane in lanes:
            _check_lane(lane)
        self._lanes = lanes

    # ---- 起止 ------------------------------------------------------------------

    async def startup(self) -> None:
        self.connection = JetStreamConnection(self.settings, name="worker" if self.is_worker_process else "tasks", client=self.client)
        await self.connection.open()
        self.js = self.connection.context
        await self._ensure_queue()
        self.puller = Puller(self.connection, self.settings.own_name(TASKS_STREAM), restore=self._ensure_queue, unwanted=self._return)
        # 越过 taskiq-nats 的 startup：它的连接、流、消费者都不是我们要的
        await AsyncBroker.startup(self)

    async def _ensure_queue(self) -> None:
        for stream in task_streams(self.settings):
            await self.connection.ensure_stream(stream)
        if self.is_worker_process:
            for lane in self.lanes:
                await self.connection.ensure_consumer(self.settings.own_name(TASKS_STREAM), self._consumer(lane))

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
        if hasattr(self, "puller"):
            await self._give_back_everything()
        await AsyncBroker.shutdown(self)
        if hasattr(self, "connection"):
            await self.connection.close()

    async def _give_back_everything(self) -> None:
        """没做完的现在就还，不必等 ack_wait。"""
        await self.puller.close()
        if not self.client.is_connected:
            return
        for message in self.puller.take_leftovers():
            self._return(message)
        await asyncio.gather(*self._returning)
        await asyncio.gather(*(delivery.give_back() for delivery in list(self.held)))

    def replace_process_once_settled(self) -> None:
        """手里的任务了结之后换一个新的进程：它有一个线程停不下来。"""
        self.replacing = True

    # ---- 投递 ------------------------------------------------------------------

    async def kick(self, message: BrokerMessage) -> None:
        """存进任务流才返回；同一个任务编号只存一次。"""
        lane = str(message.labels.get("lane", DEFAULT_LANE))
        _check_lane(lane)
        if not hasattr(self, "connection"):
            raise BridgeError("the broker is not started: await broker.startup() before sending tasks")
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
            raise error.__cause__ or error from None

    async def lane_depths(self) -> Counter[Lane]:
        """每条车道上有几条消息，做着的也算。"""
        prefix = f"{self.settings.own_name(TASKS_SUBJECT)}."
        counts = await self.connection.subject_counts(self.settings.own_name(TASKS_STREAM), f"{prefix}>")
        return Counter({lane: counts.get(prefix + lane, 0) for lane in LANES})

    # ---- 取任务 ----------------------------------------------------------------

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """TaskIQ 每有一个空位来要一条；给它的是现在最该做的那一条。"""
        logger.info("ready", lanes=list(self.lanes))
        while True:
            delivery = await self._next_delivery()
            await delivery.read_forgiven()
            if delivery.attempt > self.settings.task_max_attempts:
                delivery.error = PermanentError("every delivery ended without an answer: worker killed, or frozen beyond the ack wait")
                await delivery.settle()
            else:
                yield TaskDelivery(data=delivery.message.data, ack=_acknowledge_later, delivery=delivery)

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
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    def _hold(self, message: Msg) -> Delivery:
        delivery = Delivery(self, message)
        self.held.add(delivery)
        return delivery


class Delivery:
    """取到手的一条任务消息：第几次尝试、执行的结局、怎样了结。"""

    def __init__(self, broker: SafeJetStreamBroker, message: Msg) -> None:
        self.message = message
        self.lane = cast("Lane", message.metadata.consumer)
        self.task = "?"
        self.executed = False
        self.error: BaseException | None = None
        self.broker = broker
        self._connection = broker.connection
        self._deliveries = message.metadata.num_delivered
        self._forgiven = 0
        self._forgiven_subject = f"{broker.settings.own_name(TASKS_FORGIVEN_SUBJECT)}.{message.metadata.sequence.stream}"

    @property
    def attempt(self) -> int:
        """第几次尝试；归还的、因暂时的错误而重来的不算。没有下文的投递（进程被杀）算。"""
        return self._deliveries - self._forgiven

    async def read_forgiven(self) -> None:
        if self._deliveries == 1:
            return
        try:
            record = await self.broker.js.get_last_msg(self.broker.settings.own_name(TASKS_FORGIVEN_STREAM), self._forgiven_subject)
            self._forgiven = int(record.data or b"0")
        except NotFoundError as error:
            if error.err_code == MESSAGE_NOT_FOUND:
                return
            self._forgiven = self._deliveries - 1
        except (nats.errors.Error, ValueError):
            # 不知道就当作第一次：宁可多做一次，不可错埋
            self._forgiven = self._deliveries - 1

    async def _forgive(self) -> None:
        """服务器只数投递次数，不知道缘由；不算数的记在旁边。"""
        await self.read_forgiven()
        count = self._forgiven + 1
        await self._connection.publish(
            self._forgiven_subject, str(count).encode(), message_id=f"{self._forgiven_subject}:{self._deliveries}"
        )

    async def settle(self) -> None:
        """任务结束后：确认、隔一会儿再来、或进死信；做不到就留给 ack_wait 之后的重投。"""
        try:
            await self._settle(self.error)
        except StreamFullError:
            await self._wait_for_room()
        except Exception as error:  # noqa: BLE001  # TaskIQ 不看这件活的结局：什么错都要在这里说出来
            _not_settled.say(type(error).__name__, task=self.task, error=header_text(error))
        finally:
            self.broker.held.discard(self)

    async def _settle(self, error: BaseException | None) -> None:
        if error is None and not self.executed:
            await self._bury_or_pass_on()
        elif error is None:
            await self._connection.confirm(self.message, b"+ACK")
        elif isinstance(error, asyncio.CancelledError):
            await self.give_back()
        elif is_transient(error):
            await self._forgive()
            await self._retry(error)
        elif self._is_hopeless(error):
            await self._bury(f"{type(error).__name__}: {error}")
        else:
            await self._retry(error)

    def _is_hopeless(self, error: BaseException) -> bool:
        is_permanent = isinstance(fault_of(error) or error, PermanentError | TaskRejectedError)
        return is_permanent or self.attempt >= self.broker.settings.task_max_attempts

    async def _bury_or_pass_on(self) -> None:
        """TaskIQ 没有执行它：不是任务消息的立刻进死信；没听说过的任务也许是更新的版本敲的，让别的 worker 试过几次再说。"""
        name = self._task_name()
        if name is None or self.broker.find_task(name) is not None:
            await self._bury("poison: not a task message", is_garbage=True)
        elif self.attempt >= self.broker.settings.task_max_attempts:
            await self._bury(f"no worker here knows the task {name}: start workers of the version that sent it, then retry")
        else:
            await self._retry(PermanentError(f"this version does not know the task {name}"))

    def _task_name(self) -> str | None:
        try:
            return self.broker.formatter.loads(self.message.data).task_name
        except Exception:  # noqa: BLE001 毒消息让它抛什么都可能
            return None

    async def _retry(self, error: BaseException) -> None:
        delay = RETRY_SECONDS[min(self._deliveries, len(RETRY_SECONDS)) - 1] * random.uniform(0.8, 1.2)  # noqa: S311 错开，不关安全
        if isinstance(fault := fault_of(error), DatabaseRefusedError):
            say_refused(fault)
        else:
            logger.warning(
                "task failed, trying again", task=self.task, attempt=self.attempt, delay_seconds=round(delay, 1), error=header_text(error)
            )
        await self._connection.postpone(self.message, delay)

    async def _wait_for_room(self) -> None:
        """死信流满了：任务留在队列里，隔一会儿再来；这一次不算数。"""
        _letters_full.say(self.lane, stream=self.broker.settings.own_name(TASKS_DLQ_STREAM), task=self.task, remedy=LETTERS_FULL_REMEDY)
        with contextlib.suppress(BridgeError):
            await self._forgive()
            await self._connection.postpone(self.message, RETRY_SECONDS[-1])

    async def give_back(self) -> None:
        """没有执行，或没做完：让别的 worker 现在就拿去。"""
        try:
            await self._forgive()
            await self._connection.postpone(self.message, 0)
        except Exception as error:  # noqa: BLE001  # 没有人看这件活的结局；还不了的 ack_wait 之后会重投
            _cannot_give_back.say(type(error).__name__, task=self.task, error=header_text(error))
        finally:
            self.broker.held.discard(self)

    async def _bury(self, reason: str, *, is_garbage: bool = False) -> None:
        await self._connection.bury(
            self.message,
            letters=task_letters(self.broker.settings),
            subject=f"{self.broker.settings.own_name(TASKS_DLQ_SUBJECT)}.{self.lane}",
            reason=reason,
            attempts=self.attempt,
            is_garbage=is_garbage,
            labels={DeadLetterHeader.TASK: header_text(self.task)},
        )
        logger.error("task dead-lettered", task=self.task, lane=self.lane, attempts=self.attempt, reason=header_text(reason))


class TaskDelivery(AckableMessage):
    """交给 TaskIQ 的消息；它的 ack 什么也不做，由 SafeReceiver 在任务结束后了结。"""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    delivery: Delivery


def _acknowledge_later() -> None:
    """TaskIQ 的 ack 时机随标签与参数变；我们只认任务的结局。"""


def _check_lane(lane: str) -> None:
    if lane not in LANES:
        raise UnknownLaneError(lane, LANES)


_current: ContextVar[Delivery | None] = ContextVar("current_delivery", default=None)


class SafeReceiver(Receiver):
    """任务结束后才了结消息的接收器：`taskiq worker … --receiver bridge.broker:SafeReceiver`。"""

    def __init__(self, broker: AsyncBroker, executor: Executor | None = None, *, slots: int | str = 1, **options: Any) -> None:
        """:param slots: 同时执行几个任务（`--receiver-arg slots=2`）；TaskIQ 的默认是 100 个，线程却只有 6 个。"""
        options |= {
            "max_async_tasks": int(slots),
            "max_async_tasks_jitter": 0,
            "max_prefetch": 0,  # 预取就是扣着不做
            "ack_type": AcknowledgeType.WHEN_SAVED,
        }
        super().__init__(broker, executor, **options)
        # TaskIQ 的管理者被 kill -9 时，它的子进程不该拿着旧代码做下去
        manager = multiprocessing.parent_process()
        # Python 3.14 起由一个中间的进程来 fork，它随管理者死
        is_forked_for_us = multiprocessing.get_start_method() == "forkserver"
        parent_pid = os.getppid() if is_forked_for_us else manager.pid if manager is not None else None
        if manager is not None and parent_pid is not None and not die_with(parent_pid, signal.SIGTERM):
            sys.exit("the process manager of this worker is gone")

    async def listen(self, finish_event: asyncio.Event) -> None:
        if isinstance(self.broker, SafeJetStreamBroker):
            self.broker.stopping = finish_event
        await super().listen(finish_event)

    async def callback(self, message: bytes | AckableMessage, raise_err: bool = False) -> None:
        if not isinstance(message, TaskDelivery):
            raise TypeError(f"SafeReceiver works with SafeJetStreamBroker only, not with messages of type {type(message).__name__}")
        delivery = message.delivery
        broker = delivery.broker
        _current.set(delivery)
        async with broker.connection.in_progress([delivery.message], ack_wait_seconds=broker.settings.task_ack_wait_seconds):
            try:
                await super().callback(message, raise_err)
            except Exception as error:  # noqa: BLE001 中间件或结果后端坏了：当作任务失败，不吞掉消息
                delivery.error = error
            await delivery.settle()
        if broker.replacing:
            _replace_process()

    async def run_task(
        self, target: Callable[..., Any], message: TaskiqMessage, ack_controller: AckController | None = None
    ) -> TaskiqResult[Any]:
        delivery = _current.get()
        if delivery is not None:
            delivery.task = f"{message.task_name} {message.task_id}"
        result = await super().run_task(target, message, ack_controller)
        if delivery is not None:
            delivery.executed = True
            # NoResultError 是任务自己说不要结果，不是失败
            delivery.error = None if isinstance(result.error, NoResultError) else result.error
        return result


def _replace_process() -> None:
    """同样的命令从头再来，进程号不变；TaskIQ 的子进程没有自己的命令，退出让管理者补上。"""
    logging.shutdown()
    if multiprocessing.parent_process() is None:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # 自己的命令，不经过 shell
    os._exit(1)


async def serve(broker: SafeJetStreamBroker, *, slots: int = 1, grace_seconds: float = 30.0) -> None:
    """在本进程里做 worker，不经 TaskIQ 的进程管理器。

    SIGTERM 或 SIGINT：不再取新任务，手里的做完；过了 grace_seconds 还没完的还回队列，立刻结束进程（线程停不下来）。
    启动我们的进程先死了（它的死讯也是 SIGTERM）就不久等：没有人再管我们。
    """
    stop = asyncio.Event()
    parent = os.getppid()

    def stop_working() -> None:
        if os.getppid() != parent:
            receiver.wait_tasks_timeout = min(grace_seconds, ORPHAN_GRACE_SECONDS)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_working)
    broker.is_worker_process = True
    # 线程数等于空位数：同步任务不会取到手了还排队
    pool = ThreadPoolExecutor(slots, thread_name_prefix="task")
    receiver = SafeReceiver(broker, pool, slots=slots, wait_tasks_timeout=grace_seconds)
    try:
        await receiver.listen(stop)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # 操作者要的是那一句话，不是 TaskIQ 的任务组
    finally:
        unfinished = len(broker.held)
        await broker.shutdown()
        pool.shutdown(wait=False, cancel_futures=True)
        if unfinished:
            logger.error("leaving with unfinished tasks, they were given back", count=unfinished, exc_info=sys.exc_info()[1])
            logging.shutdown()
            os._exit(0 if stop.is_set() else 1)
