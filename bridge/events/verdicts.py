"""一批事件各判一个去向：校验，交给处理器，出了错说是谁的错。"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nats.aio.msg import Msg

from bridge.errors import InvalidEventError, is_transient
from bridge.events.event_task_utils import Decision, Done, EventTaskHandler, ReceivedEvent, Rejected
from bridge.jetstream.headers import header_text
from bridge.settings import BridgeSettings
from etl_assets.core.asset_events import AnyEvent, Event
from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, PermanentError
from etl_assets.core.log import RepeatedWarning, get_logger

_PROBES = 3
"""一批没做成，逐个再试；头几个都为外面的原因做不成，就不必试其余的。"""


@dataclass(frozen=True)
class Failed:
    """处理器没有给出决定：隔一会儿再来。

    counted 的到了次数进死信；passing 的原因在外面，等得越来越久；away 与 refused 是数据库不在、不让做，几秒就再试。
    """

    reason: str
    kind: Literal["counted", "passing", "away", "refused"]
    error: Exception | None = None


@dataclass(frozen=True)
class Garbage:
    """哪个版本也读不了它：进死信，大的只留开头。"""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """一条消息与它的去向。"""

    message: Msg
    decision: Decision | Failed | Garbage
    task_name: str = ""
    event: Event | None = None

    @property
    def wants_ring(self) -> bool:
        return isinstance(self.decision, Done) and self.decision.ring

    @property
    def is_not_its_fault(self) -> bool:
        return isinstance(self.decision, Failed) and self.decision.kind != "counted"

    @property
    def wants_database(self) -> bool:
        return isinstance(self.decision, Failed) and self.decision.kind in ("away", "refused")


class Judge:
    """把事件交给它的处理器，一个坏的拖不住其余的。"""

    def __init__(self, settings: BridgeSettings, handlers: Sequence[EventTaskHandler[Any]]) -> None:
        self._settings = settings
        self._handlers = {handler.subject: handler for handler in handlers}
        self._handler_failed = RepeatedWarning(get_logger(__name__), "handler failed, trying again")

    async def judge(self, subject: str, messages: Sequence[Msg]) -> list[Verdict]:
        """同一主题的一组：不合约定的挑出来，其余交给处理器。"""
        handler = self._handlers.get(subject)
        if handler is None:
            # 不确认也不埋：升级到一半，认得它的也许是另一个版本的监听器
            return [Verdict(message, Failed("no handler for this subject here", "passing")) for message in messages]
        verdicts: list[Verdict] = []
        valid: list[tuple[Msg, ReceivedEvent[Any]]] = []
        for message in messages:
            try:
                valid.append((message, receive(handler, message, max_bytes=self._settings.event_max_bytes)))
            except InvalidEventError as error:
                verdicts.append(Verdict(message, Garbage(error.reason) if error.is_garbage else Rejected(error.reason)))
        return verdicts + await self._call(handler, valid) if valid else verdicts

    async def _call(
        self, handler: EventTaskHandler[Any], events: Sequence[tuple[Msg, ReceivedEvent[Any]]]
    ) -> list[Verdict]:
        """整批交给处理器；出错的原因可能只在一个事件上时逐个再来，它拖不住其余的。"""
        try:
            decisions = await handler([event for _, event in events])
            return [
                Verdict(message, decision, handler.task_name, event=received.event)
                for (message, received), decision in zip(events, decisions, strict=True)
            ]
        except Exception as error:  # noqa: BLE001 处理器抛什么都不能让监听器倒下
            failed = self._blame(error, handler.subject, events)
        # 数据库不在时不逐个再试：个个都要等到超时，结果还是一样
        if len(events) == 1 or (isinstance(failed, Failed) and failed.kind == "away"):
            return [Verdict(message, failed) for message, _ in events]
        verdicts: list[Verdict] = []
        stopped_by: list[Verdict] = []
        for message, event in random.sample(events, len(events)):  # 每次都从同样几个试起，会一直轮不到别的
            if len(stopped_by) == _PROBES:  # 其余的不必各等一回锁：缘由算它们的，不是整批那一次的
                verdicts.append(replace(stopped_by[-1], message=message, event=None))
                continue
            verdicts += await self._call(handler, [(message, event)])
            stopped_by += [verdict for verdict in verdicts[-1:] if verdict.is_not_its_fault]
        return verdicts

    def _blame(
        self, error: Exception, subject: str, events: Sequence[tuple[Msg, ReceivedEvent[Any]]]
    ) -> Decision | Failed:
        """是谁的错。只有事件自己的内容能埋了它。"""
        fault, reason = fault_of(error), header_text(error)
        if isinstance(fault, DatabaseRefusedError):
            say_refused(fault)
            return Failed(reason, "refused")
        if is_transient(error):
            self._handler_failed.say(subject, subject=subject, events=len(events), error=reason)
            return Failed(reason, "away" if isinstance(fault, DatabaseUnavailableError) else "passing")
        reason = f"handler failed: {type(error).__name__}: {error}"
        if isinstance(fault, PermanentError):
            return Rejected(reason)
        return Failed(reason, "counted", error)


def receive(handler: EventTaskHandler[AnyEvent], message: Msg, *, max_bytes: int) -> ReceivedEvent[AnyEvent]:
    """一条消息变成校验过的事件；不合约定抛 InvalidEventError。"""
    if len(message.data) > max_bytes:
        raise InvalidEventError(f"{len(message.data)} bytes, ETL_EVENT_MAX_BYTES allows {max_bytes}", is_garbage=True)
    origin = message.metadata
    return ReceivedEvent(
        event=handler.parse(message.data),
        subject=message.subject,
        sequence=origin.sequence.stream,
        published_at=origin.timestamp,
        attempt=origin.num_delivered,
    )
