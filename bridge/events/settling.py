"""了结判过的事件：确认、推迟、进死信。做不到的留给 ack_wait 之后的重投。"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from nats.aio.msg import Msg

from bridge.errors import StreamFullError
from bridge.events.envelope import DataImportCompleted
from bridge.events.event_task_utils import Decision, Done, Ignored, NotYet, Rejected
from bridge.events.streams import bury_event
from bridge.events.verdicts import Failed, Garbage, Verdict
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY
from bridge.jetstream.headers import header_text
from bridge.nats_names import EVENTS_DLQ_STREAM
from bridge.settings import BridgeSettings
from etl_assets.core import metrics
from etl_assets.core.asset_events import Event
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.tracing import is_tracing, record_span, traceparent_in

logger = get_logger(__name__)

REFUSED_DELAY_SECONDS = 5.0
"""不让做的事件至多隔这么久再来：修好之后几秒就接着做。"""
LETTERS_AT_ONCE = 1_000
"""同时埋这么多；再多的隔一会儿再来。"""
FAILURES_KEPT = 10_000
"""记得这么多事件失败了几次：后来由别的监听器了结的，没有人来告诉我们。"""


class Settler:
    """埋信在旁边做：死信流慢了、不见了，好的事件照样确认。"""

    def __init__(self, settings: BridgeSettings, connection: JetStreamConnection) -> None:
        self._settings = settings
        self._connection = connection
        self._letters: dict[int, asyncio.Task[None]] = {}
        """事件在流里的序号 → 正在埋它的活。"""
        self._failures: Counter[int] = Counter()
        """事件在流里的序号 → 它自己失败了几次。不用投递次数：数据库不让做的、别人死了重投的，不是它的失败。"""
        self._not_yet = RepeatedWarning(logger, "event not ready, trying again")
        self._letters_full = RepeatedWarning(
            logger, "the dead letters are full, events that belong there wait in their stream"
        )
        self._not_settled = RepeatedWarning(logger, "events not settled, they will be delivered again")

    async def settle(self, verdicts: Sequence[Verdict]) -> None:
        """做不到的留给 ack_wait 之后的重投。"""
        outcomes = await asyncio.gather(
            *(self._carry_out(verdict.message, verdict.decision, verdict.event) for verdict in verdicts),
            return_exceptions=True,
        )
        _say_handled([verdict for verdict, outcome in zip(verdicts, outcomes, strict=True) if outcome is None])
        errors = [outcome for outcome in outcomes if outcome is not None]
        if errors:
            self._say_not_settled(errors[0], events=len(errors))

    async def finish(self, *, timeout_seconds: float) -> None:
        """要停了：等正在埋的埋完。"""
        if self._letters:
            await asyncio.wait(self._letters.values(), timeout=timeout_seconds)

    def stop(self) -> None:
        """没埋完的放下：会重投。"""
        for letter in self._letters.values():
            letter.cancel()

    async def _carry_out(self, message: Msg, decision: Decision | Failed | Garbage, event: Event | None) -> None:
        sequence, deliveries = message.metadata.sequence.stream, message.metadata.num_delivered
        # 有了决定就不再数它的失败：同一个序号不会再来
        if not isinstance(decision, Failed):
            self._failures.pop(sequence, None)
        match decision:
            case Done():
                await self._connection.confirm(message, b"+ACK")
                metrics.event_done(message.subject, "handled", stored_at=message.metadata.timestamp)
                if is_tracing():
                    _trace(message)
            case Ignored(reason):
                logger.info("event ignored", **_named(message, event), reason=header_text(reason))
                await self._connection.confirm(message, b"+ACK")
                metrics.event_done(message.subject, "ignored", stored_at=message.metadata.timestamp)
            case Rejected(reason):
                await self._bury(message, reason)
            case Garbage(reason):
                await self._bury(message, reason, is_garbage=True)
            case NotYet(reason):
                await self._wait_or_bury(message, reason)
            case Failed(_, "counted"):
                await self._count_or_bury(message, decision)
            case Failed(_, "passing"):
                await self._try_again(message, self._settings.event_backoff.seconds(deliveries), "passing")
            case Failed(_, kind):
                delay_seconds = min(self._settings.event_backoff.seconds(deliveries), REFUSED_DELAY_SECONDS)
                await self._try_again(message, delay_seconds, kind)

    async def _try_again(self, message: Msg, delay_seconds: float, reason: str) -> None:
        await self._connection.postpone(message, delay_seconds)
        metrics.event_retried(message.subject, reason)

    async def _count_or_bury(self, message: Msg, failed: Failed) -> None:
        """次数只记在内存里：进程换了就从头数，宁可多试几次。"""
        sequence = message.metadata.sequence.stream
        self._failures[sequence] += 1
        if len(self._failures) > FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        if self._failures[sequence] < self._settings.event_max_attempts:
            logger.warning("handler failed on an event", **_named(message), exc_info=failed.error)
            await self._try_again(message, self._settings.event_backoff.seconds(self._failures[sequence]), "counted")
            return
        self._failures.pop(sequence, None)
        await self._bury(message, failed.reason)

    async def _wait_or_bury(self, message: Msg, reason: str) -> None:
        """限期从事件发布算起，不从第一次投递算。"""
        age_seconds = (datetime.now(UTC) - message.metadata.timestamp).total_seconds()
        left_seconds = self._settings.event_retry_seconds - age_seconds
        if left_seconds <= 0:
            await self._bury(message, f"{reason}; given up {age_seconds:.0f} s after it was published")
            return
        delay_seconds = min(self._settings.event_backoff.seconds(message.metadata.num_delivered), left_seconds)
        self._not_yet.say(
            message.subject, subject=message.subject, reason=reason, delay_seconds=round(delay_seconds, 1)
        )
        await self._try_again(message, delay_seconds, "not_yet")

    async def _bury(self, message: Msg, reason: str, *, is_garbage: bool = False) -> None:
        """在旁边埋：死信流慢了、不见了，好的事件照样收下、确认。"""
        sequence = message.metadata.sequence.stream
        if sequence in self._letters:  # 埋得比 ack_wait 还久，又投来了
            return
        if len(self._letters) >= LETTERS_AT_ONCE:
            await self._try_again(message, REFUSED_DELAY_SECONDS, "letters")
            return
        letter = asyncio.create_task(self._store_letter(message, reason, is_garbage=is_garbage))
        self._letters[sequence] = letter
        letter.add_done_callback(lambda _: self._letters.pop(sequence, None))

    async def _store_letter(self, message: Msg, reason: str, *, is_garbage: bool) -> None:
        """死信流满了就留在 EVENTS 里，隔一会儿再来：丢掉哪一封都不由我们。"""
        origin = message.metadata
        try:
            try:
                await bury_event(
                    self._connection, message, reason=reason, attempts=origin.num_delivered, is_garbage=is_garbage
                )
            except StreamFullError:
                self._letters_full.say(
                    EVENTS_DLQ_STREAM, stream=EVENTS_DLQ_STREAM, reason=header_text(reason), remedy=LETTERS_FULL_REMEDY
                )
                # 一下就等到最久：满了要人来腾，来得勤也只是空转
                await self._try_again(message, self._settings.event_retry_delay_max_seconds, "letters")
                return
        except Exception as error:  # noqa: BLE001  # 没有人看这件活的结局；没埋成的 ack_wait 之后会重投
            self._say_not_settled(error, events=1)
            return
        metrics.event_done(message.subject, "refused", stored_at=origin.timestamp)
        logger.error(
            "event dead-lettered",
            **_named(message),
            attempts=origin.num_delivered,
            reason=header_text(reason),
        )

    def _say_not_settled(self, error: BaseException, *, events: int) -> None:
        self._not_settled.say(type(error).__name__, events=events, error=header_text(error))


def _say_handled(settled: Sequence[Verdict]) -> None:
    """一批一行：一齐来上万个时，日志不该比活还多。"""
    handled = [verdict for verdict in settled if isinstance(verdict.decision, Done)]
    if not handled:
        return
    first = _named(handled[0].message, handled[0].event)
    logger.info("event handled", **first, **({"and_others": len(handled) - 1} if len(handled) > 1 else {}))


def _named(message: Msg, event: Event | None = None) -> dict[str, object]:
    """日志里的一个事件；没有读懂的，编号是发布的人写在头里的，可以没有。"""
    event_id = (message.headers or {}).get("Nats-Msg-Id") if event is None else str(event.event_id)
    named: dict[str, object] = {"subject": message.subject, "stream_sequence": message.metadata.sequence.stream}
    if event_id:
        named["event_id"] = event_id
    if isinstance(event, DataImportCompleted):
        named["import_id"] = str(event.import_id)
    return named


def _trace(message: Msg) -> None:
    """从存进流到确认；发布的人没有带着 trace 的不记。"""
    origin = message.metadata
    if traceparent := traceparent_in(message.headers):
        record_span(
            f"handle {message.subject}",
            parent=traceparent,
            started_at=origin.timestamp,
            ended_at=datetime.now(UTC),
            stream_sequence=origin.sequence.stream,
            attempt=origin.num_delivered,
        )
