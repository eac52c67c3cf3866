"""在本进程里做 worker：任务结束后才了结消息；停下、被取消、父进程死了时，手里的都还回队列。"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from structlog.contextvars import bound_contextvars
from taskiq import AckableMessage, AsyncBroker, TaskiqMessage, TaskiqResult
from taskiq.acks import AckController, AcknowledgeType
from taskiq.exceptions import NoResultError
from taskiq.receiver import Receiver

from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.delivery import Delivery, TaskDelivery
from etl_assets.core.log import get_logger
from etl_assets.embedded.child_launcher import die_with
from etl_assets.embedded.child_process import ORPHANED

logger = get_logger(__name__)

ORPHAN_GRACE_SECONDS = 2.0
"""启动我们的进程被杀了：手里的任务再做这么久，做不完就还。"""

_current: ContextVar[Delivery | None] = ContextVar("current_delivery", default=None)


class SafeReceiver(Receiver):
    """任务结束后才了结消息的接收器：`taskiq worker … --receiver bridge.broker:SafeReceiver`。"""

    def __init__(
        self, broker: AsyncBroker, executor: Executor | None = None, *, slots: int | str = 1, **options: Any
    ) -> None:
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
        broker = self.broker
        if not isinstance(message, TaskDelivery) or not isinstance(broker, SafeJetStreamBroker):
            raise TypeError(
                f"SafeReceiver works with SafeJetStreamBroker only, not with messages of type {type(message).__name__}"
            )
        delivery = message.delivery
        # TaskIQ 只把任务消息交给 run_task：这是哪一次投递，靠上下文带过去
        _current.set(delivery)
        async with broker.connection.in_progress(
            [delivery.message], ack_wait_seconds=broker.settings.task_ack_wait_seconds
        ):
            try:
                await super().callback(message, raise_err)
            except Exception as error:  # noqa: BLE001 中间件或结果后端坏了：当作任务失败，不吞掉消息
                delivery.error = error
            # 还在报平安的时候了结：结果已经提交，此刻被投给别人就是做第二遍
            await delivery.settle()
        # 了结之后才换：换了再也没有人了结它，要等 ack_wait 才重投，还算它失败一次
        if broker.replacing:
            _replace_process()

    async def run_task(
        self, target: Callable[..., Any], message: TaskiqMessage, ack_controller: AckController | None = None
    ) -> TaskiqResult[Any]:
        delivery = _current.get()
        if delivery is not None:
            delivery.task = f"{message.task_name} {message.task_id}"
        with bound_contextvars(task_id=message.task_id):
            result = await super().run_task(target, message, ack_controller)
        if delivery is not None:
            delivery.executed = True
            # NoResultError 是任务自己说不要结果，不是失败
            delivery.error = None if isinstance(result.error, NoResultError) else result.error
        return result


def _replace_process() -> None:
    """同样的命令从头再来，进程号不变；TaskIQ 的子进程没有自己的命令，退出让管理者补上。"""
    # execv 与 _exit 都不做收尾：缓冲里的日志要先写完
    logging.shutdown()
    if multiprocessing.parent_process() is None:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # 自己的命令，不经过 shell
    os._exit(1)


async def serve(broker: SafeJetStreamBroker, *, slots: int = 1, grace_seconds: float = 30.0) -> None:
    """在本进程里做 worker，不经 TaskIQ 的进程管理器。

    SIGTERM 或 SIGINT：不再取新任务，手里的做完；过了 grace_seconds 还没完的还回队列，立刻结束进程（线程停不下来）。
    ORPHANED：启动我们的进程先死了，没有人再管我们，不久等。
    """
    stop = asyncio.Event()

    def stop_soon() -> None:
        receiver.wait_tasks_timeout = min(grace_seconds, ORPHAN_GRACE_SECONDS)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(ORPHANED, stop_soon)
    broker.is_worker_process = True
    # 线程数等于空位数：同步任务不会取到手了还排队
    pool = ThreadPoolExecutor(slots, thread_name_prefix="task")
    receiver = SafeReceiver(broker, pool, slots=slots, wait_tasks_timeout=grace_seconds)
    try:
        await receiver.listen(stop)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # 操作者要的是那一句话，不是 TaskIQ 的任务组
    finally:
        # 先归还、断线，再放下线程池：线程还在写的数据有栅栏挡着，任务却要有人接
        unfinished = len(broker.in_hand)
        await broker.shutdown()
        pool.shutdown(wait=False, cancel_futures=True)
        if unfinished:
            logger.error(
                "leaving with unfinished tasks, they were given back", count=unfinished, exc_info=sys.exc_info()[1]
            )
            logging.shutdown()
            # 正常退出会等那个停不下来的线程
            os._exit(0 if stop.is_set() else 1)
