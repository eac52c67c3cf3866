"""事件监听器：从 EVENTS 成批取事件，校验，交给处理器，敲门铃，最后才确认。"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, DiscardPolicy, StreamConfig

from bridge.errors import InvalidEventError, StreamFullError, is_transient
from bridge.events.event_task_utils import AnyEvent, Decision, Done, EventTaskHandler, Ignored, NotYet, ReceivedEvent, Rejected
from bridge.events.subjects import EVENTS_DLQ_PREFIX, EVENTS_DLQ_STREAM, EVENTS_PREFIX, EVENTS_STREAM, dead_letter_subject
from bridge.jetstream import LETTERS_FULL_REMEDY, JetStreamConnection, header_text
from bridge.pull import Puller
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, PermanentError
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

CONSUMER = "etl-bridge"
"""0.1.x 的消费者，几个主题合用；现在每个主题一个，名字以它打头。"""
OLD_CONSUMER_SECONDS = 86_400.0
"""0.1.x 的监听器都走了，这么久之后服务器自己删掉它们的消费者；其间还可以退回去。"""
LANE: Lane = "event"
MAX_ACK_PENDING = 100_000
"""没确认的这么多，服务器就不再给；推迟的也算：死信流满时推迟的不能挡住好的。等着导入的事件记在台账里，不在其中。"""
FINISH_SECONDS = 20.0
"""要求停下之后，手里那一批最多再做这么久；没确认的会重投。"""
REFUSED_PAUSE_SECONDS = 2.0
"""数据库谁也不让做时，隔这么久才取下一批。"""
REFUSED_DELAY_SECONDS = 5.0
"""不让做的事件至多隔这么久再来：修好之后几秒就接着做。"""
LETTERS_AT_ONCE = 1_000
"""同时埋这么多；再多的隔一会儿再来。"""
FAILURES_KEPT = 10_000
"""记得这么多事件失败了几次：后来由别的监听器了结的，没有人来告诉我们。"""
_PROBES = 3
"""一批没做成，逐个再试；头几个都为外面的原因做不成，就不必试其余的。"""

_DAY = 86_400
_MIB = 1 << 20
_HEADER_ROOM = 16 << 10


def events_stream(settings: BridgeSettings) -> StreamConfig:
    """没有 EVENTS 时由我们建的那一个。满了就拒收，发布的人知道；丢旧的会丢掉还没处理的。太大的进不来，占不满它。"""
    return StreamConfig(
        name=EVENTS_STREAM,
        subjects=[EVENTS_PREFIX + ">"],
        discard=DiscardPolicy.NEW,
        max_bytes=1024 * _MIB,
        max_msg_size=settings.event_max_bytes + _HEADER_ROOM,
        max_age=30 * _DAY,
        duplicate_window=600,
    )


# 满了就拒收，事件留在 EVENTS 里；不过期：人丢弃之前什么都不丢
DEAD_LETTERS = StreamConfig(
    name=EVENTS_DLQ_STREAM,
    subjects=[EVENTS_DLQ_PREFIX + ">"],
    discard=DiscardPolicy.NEW,
    max_bytes=64 * _MIB,
    duplicate_window=600,
)


def consumer_name(settings: BridgeSettings, subject: str) -> str:
    """一个主题一个持久消费者：谁也不会拿到自己不认识的主题，谁也不会改窄别人的过滤。"""
    return f"{settings.own_name(CONSUMER)}_{subject.removeprefix(EVENTS_PREFIX).replace('.', '-')}"


async def consumer_names(settings: BridgeSettings, connection: JetStreamConnection) -> list[str]:
    """这套安装在 EVENTS 上的消费者，别的版本建的也算；还没有人监听过就是空的。"""
    prefix = f"{settings.own_name(CONSUMER)}_"
    return sorted(name for name in await connection.consumer_names(EVENTS_STREAM) if name.startswith(prefix))


Result = TypeVar("Result")
Ring = Callable[[str, Lane], Awaitable[None]]


@dataclass(frozen=True)
class _Failed:
    """处理器没有给出决定：隔一会儿再来。

    counted 的到了次数进死信；passing 的原因在外面，等得越来越久；away 与 refused 是数据库不在、不让做，几秒就再试。
    """

    reason: str
    kind: Literal["counted", "passing", "away", "refused"]


@dataclass(frozen=True)
class _Garbage:
    """哪个版本也读不了它：进死信，大的只留开头。"""

    reason: str


@dataclass(frozen=True)
class _Verdict:
    """一条消息与它的去向。"""

    message: Msg
    decision: Decision | _Failed | _Garbage
    task_name: str = ""

    @property
    def wants_ring(self) -> bool:
        return isinstance(self.decision, Done) and self.decision.ring

    @property
    def is_not_its_fault(self) -> bool:
        return isinstance(self.decision, _Failed) and self.decision.kind != "counted"

    @property
    def wants_database(self) -> bool:
        return isinstance(self.decision, _Failed) and self.decision.kind in ("away", "refused")


class Listener:
    """每个主题一个持久消费者；同时开几个监听器，事件在它们之间分。"""

    def __init__(self, settings: BridgeSettings, *, handlers: Sequence[EventTaskHandler[Any]], ring: Ring) -> None:
        self._settings = settings
        self._handlers = {handler.subject: handler for handler in handlers}
        self._ring = ring
        self._consumers = {subject: consumer_name(settings, subject) for subject in sorted(self._handlers)}
        self._connection = JetStreamConnection(settings, name="listener")
        self._puller = Puller(self._connection, EVENTS_STREAM, restore=self._ensure_streams)
        self._settling: asyncio.Task[None] | None = None
        self._letters: dict[int, asyncio.Task[None]] = {}
        """事件在流里的序号 → 正在埋它的活。"""
        self._failures: Counter[int] = Counter()
        """事件在流里的序号 → 它自己失败了几次。不用投递次数：数据库不让做的、别人死了重投的，不是它的失败。"""
        self._handler_failed = RepeatedWarning(logger, "handler failed, trying again")
        self._cannot_ring = RepeatedWarning(logger, "cannot ring, trying again")
        self._not_yet = RepeatedWarning(logger, "event not ready, trying again")
        self._letters_full = RepeatedWarning(logger, "the dead letters are full, events that belong there wait in their stream")
        self._not_settled = RepeatedWarning(logger, "events not settled, they will be delivered again")

    async def run(self, stop: asyncio.Event) -> None:
        """监听到 stop 为止；NATS 中途断开不算错，开头连不上抛 BridgeError。"""
        await self._connection.open()
        stopping = asyncio.create_task(stop.wait())
        try:
            await self._ensure_streams()
            logger.info("ready", subjects=sorted(self._handlers))
            while not stop.is_set():
                await self._work(stopping)
            if self._settling is not None:
                await asyncio.wait({self._settling}, timeout=FINISH_SECONDS)
            if self._letters:
                await asyncio.wait(self._letters.values(), timeout=FINISH_SECONDS)
        finally:
            stopping.cancel()
            if self._settling is not None:
                self._settling.cancel()
            for letter in self._letters.values():
                letter.cancel()
            await self._connection.close()

    async def _ensure_streams(self) -> None:
        await self._connection.adopt_stream(events_stream(self._settings), sorted(self._handlers))
        await self._connection.ensure_stream(DEAD_LETTERS)
        old = await self._connection.consumer_info(EVENTS_STREAM, self._settings.own_name(CONSUMER))
        for subject in self._consumers:
            await self._connection.ensure_consumer(EVENTS_STREAM, self._consumer(subject, old))
        if old is not None and old.config.inactive_threshold != OLD_CONSUMER_SECONDS:
            await self._connection.ensure_consumer(EVENTS_STREAM, old.config.evolve(inactive_threshold=OLD_CONSUMER_SECONDS))

    def _consumer(self, subject: str, old: ConsumerInfo | None) -> ConsumerConfig:
        """0.1.x 已经确认到哪里，就从哪里接着；它不认识的主题从头读起。"""
        config = ConsumerConfig(
            durable_name=self._consumers[subject],
            filter_subject=subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._settings.event_ack_wait_seconds,
            max_deliver=-1,  # 次数由我们数：服务器的上限会让事件无声地搁浅
            max_ack_pending=MAX_ACK_PENDING,
        )
        if old is None or old.ack_floor is None or not _filters(old.config, subject):
            return config
        return config.evolve(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=old.ack_floor.stream_seq + 1)

    async def _work(self, stopping: asyncio.Task[Any]) -> None:
        """取一批、处理一批；要求停下时不再等新的，手里的做完。"""
        linger_seconds = self._settings.listener_batch_milliseconds / 1000
        pulling = self._puller.wait(list(self._consumers.values()), batch=self._settings.listener_batch_size, linger_seconds=linger_seconds)
        messages = await _until_stopping(pulling, stopping, patience_seconds=0) or []
        if stopping.done():
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
            verdicts = [verdict for subject, group in groups.items() for verdict in await self._judge(subject, group)]
            verdicts = await self._ring_doorbells(verdicts)
            await self._until_settled()
        # 等服务器答应一千次确认的工夫，下一批可以进台账了
        self._settling = asyncio.create_task(self._settle(verdicts))
        return all(verdict.wants_database for verdict in verdicts)

    async def _until_settled(self) -> None:
        """上一批的了结；至多一批在了结。"""
        if self._settling is not None:
            await self._settling

    async def _judge(self, subject: str, messages: Sequence[Msg]) -> list[_Verdict]:
        """同一主题的一组：不合约定的挑出来，其余交给处理器。"""
        handler = self._handlers.get(subject)
        if handler is None:
            return [_Verdict(message, _Failed("no handler for this subject here", "passing")) for message in messages]
        verdicts: list[_Verdict] = []
        valid: list[tuple[Msg, ReceivedEvent[Any]]] = []
        for message in messages:
            try:
                valid.append((message, receive(handler, message, max_bytes=self._settings.event_max_bytes)))
            except InvalidEventError as error:
                verdicts.append(_Verdict(message, _Garbage(error.reason) if error.is_garbage else Rejected(error.reason)))
        return verdicts + await self._call(handler, valid) if valid else verdicts

    async def _call(self, handler: EventTaskHandler[Any], events: Sequence[tuple[Msg, ReceivedEvent[Any]]]) -> list[_Verdict]:
        """整批交给处理器；出错的原因可能只在一个事件上时逐个再来，它拖不住其余的。"""
        try:
            decisions = await handler([event for _, event in events])
            return [_Verdict(message, decision, handler.task_name) for (message, _), decision in zip(events, decisions, strict=True)]
        except Exception as error:  # noqa: BLE001 处理器抛什么都不能让监听器倒下
            failed = self._blame(error, handler.subject, events)
        if len(events) == 1 or (isinstance(failed, _Failed) and failed.kind == "away"):
            return [_Verdict(message, failed) for message, _ in events]
        verdicts: list[_Verdict] = []
        for message, event in random.sample(events, len(events)):  # 每次都从同样几个试起，会一直轮不到别的
            if len(verdicts) >= _PROBES and all(verdict.is_not_its_fault for verdict in verdicts):
                verdicts.append(_Verdict(message, failed))
            else:
                verdicts += await self._call(handler, [(message, event)])
        return verdicts

    def _blame(self, error: Exception, subject: str, events: Sequence[tuple[Msg, ReceivedEvent[Any]]]) -> Decision | _Failed:
        """是谁的错。只有事件自己的内容能埋了它。"""
        fault, reason = fault_of(error), header_text(error)
        if isinstance(fault, DatabaseRefusedError):
            say_refused(fault)
            return _Failed(reason, "refused")
        if is_transient(error):
            self._handler_failed.say(subject, subject=subject, events=len(events), error=reason)
            return _Failed(reason, "away" if isinstance(fault, DatabaseUnavailableError) else "passing")
        reason = f"handler failed: {type(error).__name__}: {error}"
        if isinstance(fault, PermanentError):
            return Rejected(reason)
        if len(events) == 1 and self._failures[events[0][1].sequence] + 1 < self._settings.event_max_attempts:
            logger.warning("handler failed on an event", subject=subject, sequence=events[0][1].sequence, exc_info=error)
        return _Failed(reason, "counted")

    async def _ring_doorbells(self, verdicts: Sequence[_Verdict]) -> list[_Verdict]:
        """每个任务一批只敲一次；敲不响的那些事件稍后再来，不确认。"""
        failed: dict[str, _Failed] = {}
        for task_name in sorted({verdict.task_name for verdict in verdicts if verdict.wants_ring}):
            try:
                await self._ring(task_name, LANE)
            except Exception as error:  # noqa: BLE001 门铃没存下就不能确认，原因不论
                self._cannot_ring.say(type(error).__name__, task=task_name, error=header_text(error))
                failed[task_name] = _Failed(f"cannot ring {task_name}: {error}", "passing")
        return [
            replace(verdict, decision=failed[verdict.task_name]) if verdict.wants_ring and verdict.task_name in failed else verdict
            for verdict in verdicts
        ]

    # ---- 了结 ------------------------------------------------------------------

    async def _settle(self, verdicts: Sequence[_Verdict]) -> None:
        """做不到的留给 ack_wait 之后的重投。"""
        outcomes = await asyncio.gather(
            *(self._carry_out(verdict.message, verdict.decision) for verdict in verdicts), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if outcome is not None]
        if errors:
            self._say_not_settled(errors[0], events=len(errors))

    def _say_not_settled(self, error: BaseException, *, events: int) -> None:
        self._not_settled.say(type(error).__name__, events=events, error=header_text(error))

    async def _carry_out(self, message: Msg, decision: Decision | _Failed | _Garbage) -> None:
        sequence, deliveries = message.metadata.sequence.stream, message.metadata.num_delivered
        if not isinstance(decision, _Failed):
            self._failures.pop(sequence, None)
        match decision:
            case Done():
                await self._connection.confirm(message, b"+ACK")
            case Ignored(reason):
                logger.info("event ignored", subject=message.subject, sequence=sequence, reason=header_text(reason))
                await self._connection.confirm(message, b"+ACK")
            case Rejected(reason):
                await self._bury(message, reason)
            case _Garbage(reason):
                await self._bury(message, reason, is_garbage=True)
            case NotYet(reason):
                await self._wait_or_bury(message, reason)
            case _Failed(reason, "counted"):
                await self._count_or_bury(message, reason)
            case _Failed(_, "passing"):
                await self._connection.postpone(message, self._delay_seconds(deliveries))
            case _Failed():
                await self._connection.postpone(message, min(self._delay_seconds(deliveries), REFUSED_DELAY_SECONDS))

    async def _count_or_bury(self, message: Msg, reason: str) -> None:
        """次数只记在内存里：进程换了就从头数，宁可多试几次。"""
        sequence = message.metadata.sequence.stream
        self._failures[sequence] += 1
        if len(self._failures) > FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        if self._failures[sequence] < self._settings.event_max_attempts:
            await self._connection.postpone(message, self._delay_seconds(self._failures[sequence]))
            return
        self._failures.pop(sequence, None)
        await self._bury(message, reason)

    async def _wait_or_bury(self, message: Msg, reason: str) -> None:
        """限期从事件发布算起，不从第一次投递算。"""
        age_seconds = (datetime.now(UTC) - message.metadata.timestamp).total_seconds()
        left_seconds = self._settings.event_retry_seconds - age_seconds
        if left_seconds <= 0:
            await self._bury(message, f"{reason}; given up {age_seconds:.0f} s after it was published")
            return
        delay_seconds = min(self._delay_seconds(message.metadata.num_delivered), left_seconds)
        self._not_yet.say(message.subject, subject=message.subject, reason=reason, delay_seconds=round(delay_seconds, 1))
        await self._connection.postpone(message, delay_seconds)

    def _delay_seconds(self, attempt: int) -> float:
        doubled = self._settings.event_retry_delay_seconds * 2.0 ** min(attempt - 1, 30)
        return min(doubled, self._settings.event_retry_delay_max_seconds)

    async def _bury(self, message: Msg, reason: str, *, is_garbage: bool = False) -> None:
        """在旁边埋：死信流慢了、不见了，好的事件照样收下、确认。"""
        sequence = message.metadata.sequence.stream
        if sequence in self._letters:  # 埋得比 ack_wait 还久，又投来了
            return
        if len(self._letters) >= LETTERS_AT_ONCE:
            await self._connection.postpone(message, REFUSED_DELAY_SECONDS)
            return
        letter = asyncio.create_task(self._store_letter(message, reason, is_garbage=is_garbage))
        self._letters[sequence] = letter
        letter.add_done_callback(lambda _: self._letters.pop(sequence, None))

    async def _store_letter(self, message: Msg, reason: str, *, is_garbage: bool) -> None:
        """死信流满了就留在 EVENTS 里，隔一会儿再来：丢掉哪一封都不由我们。"""
        origin = message.metadata
        dead = dead_letter_subject(message.subject)
        try:
            try:
                await self._connection.bury(
                    message, letters=DEAD_LETTERS, subject=dead, reason=reason, attempts=origin.num_delivered, is_garbage=is_garbage
                )
            except StreamFullError:
                self._letters_full.say(EVENTS_DLQ_STREAM, stream=EVENTS_DLQ_STREAM, reason=header_text(reason), remedy=LETTERS_FULL_REMEDY)
                await self._connection.postpone(message, self._settings.event_retry_delay_max_seconds)
                return
        except Exception as error:  # noqa: BLE001  # 没有人看这件活的结局；没埋成的 ack_wait 之后会重投
            self._say_not_settled(error, events=1)
            return
        logger.error(
            "event dead-lettered",
            subject=message.subject,
            sequence=origin.sequence.stream,
            attempts=origin.num_delivered,
            reason=header_text(reason),
        )


def _filters(config: ConsumerConfig, subject: str) -> bool:
    return subject == config.filter_subject or subject in (config.filter_subjects or [])


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


async def _until_stopping(work: Coroutine[Any, Any, Result], stopping: asyncio.Task[Any], *, patience_seconds: float) -> Result | None:
    """做 work；要求停下之后再给它 patience_seconds，做不完就取消，返回 None。"""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({task}, timeout=patience_seconds)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    return None if task.cancelled() else task.result()
