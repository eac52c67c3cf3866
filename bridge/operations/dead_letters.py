"""死信：看有哪些，放回原来的主题，或者丢弃。名字是种类加死信流里的序号，例如 events-17、tasks-3。"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

from nats.aio.msg import Msg
from nats.js.api import PubAck

from bridge.errors import StrayLetterError, TruncatedLetterError, UnknownLetterError
from bridge.events.asset_events import asset_events
from bridge.events.handlers import HANDLERS
from bridge.events.subjects import completed_asset, dead_letter_subject
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import DeadLetterHeader
from bridge.jetstream.headers import header_text
from bridge.jetstream.stored_messages import Stretch, delete_message, read_stored
from bridge.jetstream.streams import NEARLY_FULL, stream_state, stream_use
from bridge.nats_names import (
    EVENTS_DLQ_PREFIX,
    EVENTS_DLQ_STREAM,
    EVENTS_PREFIX,
    EVENTS_STREAM,
    TASKS_DLQ_STREAM,
    TASKS_DLQ_SUBJECT,
    TASKS_STREAM,
    TASKS_SUBJECT,
)
from bridge.operations.replay import replayable_subjects
from bridge.settings import LANES, BridgeSettings


@dataclass(frozen=True)
class DeadLetter:
    """一封死信；body 只在要它的时候才取。"""

    letter_id: str
    stream: str
    sequence: int
    stored_subject: str
    stored_at: datetime
    headers: dict[str, str]
    body: bytes = b""

    @property
    def subject(self) -> str:
        return self.headers.get(DeadLetterHeader.SUBJECT, "")

    @property
    def attempts(self) -> int | None:
        return self._number(DeadLetterHeader.ATTEMPTS)

    @property
    def reason(self) -> str:
        return self.headers.get(DeadLetterHeader.REASON, "")

    @property
    def original_bytes(self) -> int | None:
        """埋下时正文被截短了，这是原来的长度；完整的是 None。"""
        return self._number(DeadLetterHeader.ORIGINAL_BYTES)

    def _number(self, header: DeadLetterHeader) -> int | None:
        text = self.headers.get(header, "")
        return int(text) if text.isdecimal() else None


class DeadLetters(JetStreamConnection):
    """两个死信流：`async with DeadLetters(settings) as letters`。"""

    def __init__(self, settings: BridgeSettings) -> None:
        super().__init__(settings, name="dead-letters")
        own = settings.own_name
        self._streams = {"events": EVENTS_DLQ_STREAM, "tasks": own(TASKS_DLQ_STREAM)}
        self._tasks = {
            f"{own(TASKS_DLQ_SUBJECT)}.{lane}": (own(TASKS_STREAM), f"{own(TASKS_SUBJECT)}.{lane}") for lane in LANES
        }
        """任务的死信的主题 → 它原来的流与主题。"""

    async def matching(self, *, reason_contains: str | None = None) -> list[DeadLetter]:
        """此刻的死信，不带正文，旧的在前；流有上限，所以装得下。"""
        found = [letter for kind in self._streams async for letter in self._read(kind)]
        if reason_contains is not None:
            found = [letter for letter in found if reason_contains.casefold() in letter.reason.casefold()]
        return sorted(found, key=lambda letter: letter.stored_at)

    async def find(self, letter_id: str) -> DeadLetter:
        """一封死信，带正文。

        :raises UnknownLetterError: 没有这封，或者名字不像。
        """
        name = re.fullmatch(r"([a-z]+)-([1-9][0-9]{0,18})", letter_id)
        if name is None or name[1] not in self._streams:
            raise UnknownLetterError(letter_id)
        sequence = int(name[2])
        async for letter in self._read(name[1], Stretch(sequence, sequence), headers_only=False):
            return letter
        raise UnknownLetterError(letter_id)

    async def nearly_full(self) -> list[tuple[str, float]]:
        """快满了的死信流，占了几成；满了的不再收，该埋的留在原来的流里。"""
        uses = [(stream, await stream_use(self, stream)) for stream in self._streams.values()]
        return [(stream, use.share) for stream, use in uses if use is not None and use.share >= NEARLY_FULL]

    async def retry(self, letter_id: str) -> PubAck:
        """原文放回原来的主题，流存下之后才删去死信。

        消息编号由死信而来：与原来的不同，所以不会被当成重复；中途崩溃再来一次时相同，去重窗口之内只存一份。

        :raises TruncatedLetterError: 正文不全。
        :raises StrayLetterError: 不是我们写的，或者没有谁处理它的主题。
        """
        letter = await self.find(letter_id)
        if problem := self.problem(letter):
            raise StrayLetterError(letter_id, problem)
        # 后面没有资产的、后来拿走了的；只在这里问数据库，它不在时死信照样看得见
        if _is_of_an_asset(letter.subject) and letter.subject not in await replayable_subjects():
            raise StrayLetterError(letter_id, f"nothing listens to {letter.subject}")
        if letter.original_bytes is not None:
            raise TruncatedLetterError(letter_id, kept_bytes=len(letter.body), original_bytes=letter.original_bytes)
        message_id = f"retry-{letter.stream}-{letter.sequence}-{letter.stored_at.timestamp():.6f}"
        stored = await self.publish(letter.subject, letter.body, message_id=message_id)
        await self.drop(letter)
        return stored

    def problem(self, letter: DeadLetter) -> str | None:
        """它为什么不像是我们写的；像的是 None。谁都能往死信流里写，消息头说的主题不能照着发。"""
        original = self._tasks.get(letter.stored_subject) or _original_event(letter.stored_subject)
        if original is None:
            return f"{letter.stored_subject} is not where we put dead letters"
        stream, subject = original
        if letter.subject != subject:
            return f"it was stored on {letter.stored_subject}, but names the subject {header_text(letter.subject) or 'none'}"
        sequence = letter.headers.get(DeadLetterHeader.SEQUENCE, "")
        is_consistent = (
            letter.headers.get(DeadLetterHeader.STREAM) == stream
            and sequence.isdecimal()
            and letter.attempts is not None
            and letter.headers.get("Nats-Msg-Id", "").startswith(f"{stream}-{sequence}-")
        )
        return None if is_consistent else f"its headers are not those of a message of {stream}"

    async def drop(self, letter: DeadLetter) -> None:
        """删去一封；已经不在了也算。"""
        await delete_message(self, letter.stream, letter.sequence)

    async def _read(
        self, kind: str, stretch: Stretch | None = None, *, headers_only: bool = True
    ) -> AsyncIterator[DeadLetter]:
        stream = self._streams[kind]
        state = await stream_state(self, stream)
        if state is None:
            return
        wanted = stretch or Stretch(1, state.last_seq)
        if isinstance(wanted.first, int) and wanted.first > state.last_seq:
            return
        async for messages in read_stored(self, stream, wanted, headers_only=headers_only):
            for message in messages:
                yield _letter(kind, message)


def _letter(kind: str, message: Msg) -> DeadLetter:
    origin = message.metadata
    sequence = origin.sequence.stream
    return DeadLetter(
        f"{kind}-{sequence}",
        origin.stream,
        sequence,
        message.subject,
        origin.timestamp,
        dict(message.headers or {}),
        message.data,
    )


def _original_event(stored_subject: str) -> tuple[str, str] | None:
    """事件的死信原来的流与主题；不是我们处理的是 None。"""
    subject = EVENTS_PREFIX + stored_subject.removeprefix(EVENTS_DLQ_PREFIX)
    is_ours = _is_of_an_asset(subject) or subject in {handler.subject for handler in HANDLERS}
    return (EVENTS_STREAM, subject) if is_ours and dead_letter_subject(subject) == stored_subject else None


def _is_of_an_asset(subject: str) -> bool:
    """有没有谁听它，要看图里有哪些资产。"""
    return completed_asset(subject) is not None or subject in asset_events()
