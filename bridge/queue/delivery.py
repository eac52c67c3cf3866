"""取到手的一条任务消息：第几次尝试、执行的结局、怎样了结。"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal, cast

import nats.errors
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError
from pydantic import ConfigDict
from taskiq import AckableMessage, AsyncBroker
from taskiq.exceptions import TaskRejectedError

from bridge.errors import BridgeError, StreamFullError, is_transient
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY, DeadLetterHeader, bury
from bridge.jetstream.headers import header_text
from bridge.jetstream.server_errors import MESSAGE_NOT_FOUND
from bridge.jetstream.streams import store
from bridge.nats_names import TASKS_DLQ_STREAM, TASKS_DLQ_SUBJECT, TASKS_FORGIVEN_STREAM, TASKS_FORGIVEN_SUBJECT
from bridge.queue.streams import forgiven_deliveries, task_letters
from bridge.settings import Lane
from etl_assets.core import metrics
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, PermanentError
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

RETRY = Backoff(first_seconds=1.0, longest_seconds=30.0, factor=5.0, spread=0.2)
"""推迟着的门铃多了就没有人再敲，所以不等得更久。"""

_not_settled = RepeatedWarning(logger, "task not settled, it will be delivered again")
_cannot_give_back = RepeatedWarning(logger, "task not given back, it will be delivered again")
_letters_full = RepeatedWarning(logger, "the dead letters are full, tasks that belong there wait in their queue")


class Delivery:
    """取到手的一条任务消息：第几次尝试、执行的结局、怎样了结。"""

    def __init__(
        self, message: Msg, broker: AsyncBroker, connection: JetStreamConnection, in_hand: set[Delivery]
    ) -> None:
        """:param in_hand: 手里还有哪些；了结之前它在其中。"""
        self.message = message
        self.lane = cast("Lane", message.metadata.consumer)
        self.task = "?"
        self.executed = False
        self.error: BaseException | None = None
        self._broker = broker
        self._connection = connection
        self._settings = connection.settings
        self._in_hand = in_hand
        self._deliveries = message.metadata.num_delivered
        self._forgiven = 0
        self._forgiven_subject = f"{self._settings.own_name(TASKS_FORGIVEN_SUBJECT)}.{message.metadata.sequence.stream}"
        in_hand.add(self)

    @property
    def attempt(self) -> int:
        """第几次尝试；归还的、因暂时的错误而重来的不算。没有下文的投递（进程被杀）算。"""
        return self._deliveries - self._forgiven

    async def read_forgiven(self) -> None:
        if self._deliveries == 1:
            return
        try:
            stream = self._settings.own_name(TASKS_FORGIVEN_STREAM)
            record = await self._connection.context.get_last_msg(stream, self._forgiven_subject)
            self._forgiven = int(record.data or b"0")
        except NotFoundError as error:
            # 没有这一条，当作从没宽恕过；别的 404 是整个流不见了，那是不知道
            if error.err_code == MESSAGE_NOT_FOUND:
                return
            self._forgiven = self._deliveries - 1
        except (nats.errors.Error, ValueError):
            # 不知道就当作第一次：宁可多做一次，不可错埋
            self._forgiven = self._deliveries - 1

    async def _forgive(self) -> None:
        """服务器只数投递次数，不知道缘由；不算数的记在旁边。"""
        # 一到手就还的没有读过：不读就从零加起，以前宽恕的都白费
        await self.read_forgiven()
        count = self._forgiven + 1
        # 编号里有投递次数：没等到答复而重发的，同一次投递也只宽恕一回
        await store(
            self._connection,
            forgiven_deliveries(self._settings),
            self._forgiven_subject,
            str(count).encode(),
            message_id=f"{self._forgiven_subject}:{self._deliveries}",
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
            self._in_hand.discard(self)

    async def _settle(self, error: BaseException | None) -> None:
        if error is None and not self.executed:
            await self._bury_or_pass_on()
        elif error is None:
            await self._connection.confirm(self.message, b"+ACK")
            self._count("done")
        elif isinstance(error, asyncio.CancelledError):
            await self.give_back()
        elif is_transient(error):
            # 先记下这次不算数，再推迟：反过来，死在两步之间就成了一次失败
            await self._forgive()
            await self._retry(error)
        elif self._is_hopeless(error):
            # 在暂时的之后判：装错了、设错了的也是 PermanentError，却不是任务的错，不该埋
            await self._bury(f"{type(error).__name__}: {error}")
        else:
            await self._retry(error)

    def _is_hopeless(self, error: BaseException) -> bool:
        is_permanent = isinstance(fault_of(error) or error, PermanentError | TaskRejectedError)
        return is_permanent or self.attempt >= self._settings.task_max_attempts

    async def _bury_or_pass_on(self) -> None:
        """TaskIQ 没有执行它：不是任务消息的立刻进死信；没听说过的任务也许是更新的版本敲的，让别的 worker 试过几次再说。"""
        name = self._task_name()
        if name is None or self._broker.find_task(name) is not None:
            await self._bury("poison: not a task message", is_garbage=True)
        elif self.attempt >= self._settings.task_max_attempts:
            await self._bury(
                f"no worker here knows the task {name}: start workers of the version that sent it, then retry"
            )
        else:
            await self._retry(PermanentError(f"this version does not know the task {name}"))

    def _task_name(self) -> str | None:
        try:
            return self._broker.formatter.loads(self.message.data).task_name
        except Exception:  # noqa: BLE001 毒消息让它抛什么都可能
            return None

    async def _retry(self, error: BaseException) -> None:
        delay = RETRY.seconds(self._deliveries)
        if isinstance(fault := fault_of(error), DatabaseRefusedError):
            say_refused(fault)
        else:
            logger.warning(
                "task failed, trying again",
                task=self.task,
                attempt=self.attempt,
                delay_seconds=round(delay, 1),
                error=header_text(error),
            )
        await self._connection.postpone(self.message, delay)
        self._count("retried")

    async def _wait_for_room(self) -> None:
        """死信流满了：任务留在队列里，隔一会儿再来；这一次不算数。"""
        _letters_full.say(
            self.lane, stream=self._settings.own_name(TASKS_DLQ_STREAM), task=self.task, remedy=LETTERS_FULL_REMEDY
        )
        with contextlib.suppress(BridgeError):  # 满了的也许是整个存储，记不下这一次
            await self._forgive()
        with contextlib.suppress(BridgeError):
            await self._connection.postpone(self.message, RETRY.longest_seconds)

    async def give_back(self) -> None:
        """没有执行，或没做完：让别的 worker 现在就拿去。"""
        try:
            await self._forgive()
            await self._connection.postpone(self.message, 0)
            self._count("returned")
        except Exception as error:  # noqa: BLE001  # 没有人看这件活的结局；还不了的 ack_wait 之后会重投
            _cannot_give_back.say(type(error).__name__, task=self.task, error=header_text(error))
        finally:
            self._in_hand.discard(self)

    async def _bury(self, reason: str, *, is_garbage: bool = False) -> None:
        await bury(
            self._connection,
            self.message,
            letters=task_letters(self._settings),
            subject=f"{self._settings.own_name(TASKS_DLQ_SUBJECT)}.{self.lane}",
            reason=reason,
            attempts=self.attempt,
            is_garbage=is_garbage,
            labels={DeadLetterHeader.TASK: header_text(self.task)},
        )
        self._count("dead_lettered")
        logger.error(
            "task dead-lettered", task=self.task, lane=self.lane, attempts=self.attempt, reason=header_text(reason)
        )

    def _count(self, outcome: Literal["done", "retried", "returned", "dead_lettered"]) -> None:
        """只说认得的任务的名字：毒消息里写着什么，不该成为一个标签。"""
        name = self.task.partition(" ")[0]
        metrics.task_settled(name if self._broker.find_task(name) is not None else "unknown", self.lane, outcome)


class TaskDelivery(AckableMessage):
    """交给 TaskIQ 的消息；TaskIQ 的 ack 时机随标签与参数变，我们只认任务的结局，由 SafeReceiver 在任务结束后了结。"""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    delivery: Delivery
