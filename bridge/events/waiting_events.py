"""等着导入的事件：按时看台账里到点的，导入好了的敲门铃，限期过了的进死信。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from bridge.errors import StreamFullError
from bridge.events.due_bell import DueBell
from bridge.events.envelope import DataImportCompleted
from bridge.events.streams import bury_event
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY
from bridge.jetstream.stored_messages import StoredMessage, stored_message
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM
from etl_assets.core.database_sync import transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.intake.imports import NO_SEQUENCE
from etl_assets.intake.waiting_events import Patience, WaitingEvent, forget, look_after_waiting_events
from etl_assets.reports.reports import count_waiting_events

logger = get_logger(__name__)

_letters_full = RepeatedWarning(
    logger, "the dead letters are full, events whose imports did not come stay in the ledger"
)

SPEAK_SECONDS = 60.0
# 一批一千个：两万个在等，一秒也只花百分之几秒，每个最迟十秒看到一回
FRUITLESS_BITES = 2
_AT_ONCE = 50
"""同时往死信流里存这么多封。"""


class WaitingEvents:
    """监听器里看着它们的那一个；几个监听器各有一个，到点的在它们之间分。"""

    def __init__(self, bell: DueBell) -> None:
        self._bell = bell
        limits = bell.broker.settings
        self._patience = Patience(limits.event_backoff, limit_seconds=limits.event_retry_seconds)
        self._speak_at = 0.0

    async def look(self) -> None:
        """看到没有到点的为止；一批里没有一个导入是好的，只再看一批：等着的再多，也只花这么些工夫。"""
        bell, fruitless, more = self._bell, 0, True
        while more and fruitless < FRUITLESS_BITES:
            look = await asyncio.to_thread(look_after_waiting_events, bell.engine, bell.settings, self._patience)
            more = look.more
            # 先敲门再埋信：死信流慢了、满了，已经进了台账的不跟着等
            if look.requested:
                await bell.ring()
            else:
                fruitless += 1
            if look.waiting:
                await self._speak()
            await self._bury(look.overdue)

    async def _speak(self) -> None:
        """有事件在等，一分钟说一回。"""
        if time.monotonic() < self._speak_at:
            return
        self._speak_at = time.monotonic() + SPEAK_SECONDS
        waiting = await asyncio.to_thread(transact, self._bell.engine, count_waiting_events, self._bell.settings)
        logger.info("events wait for their imports", events=waiting.events, oldest_stored_at=str(waiting.oldest))

    async def _bury(self, overdue: Sequence[WaitingEvent]) -> None:
        """存进了死信流的才不再等；存不了的留着，到点再来。"""
        bell = self._bell
        for first in range(0, len(overdue), _AT_ONCE):
            events = overdue[first : first + _AT_ONCE]
            outcomes = await asyncio.gather(
                *(_bury(bell.broker.connection, event) for event in events), return_exceptions=True
            )
            buried = [event for event, outcome in zip(events, outcomes, strict=True) if outcome is None]
            if buried:
                await asyncio.to_thread(transact, bell.engine, forget, bell.settings.target_schema, buried)
                logger.error(
                    "events dead-lettered: their imports did not come in time",
                    events=len(buried),
                    stream_sequence=buried[0].sequence,
                    reason=_reason(buried[0]),
                )
            for outcome in outcomes:
                # 一封存不下，后面的也存不下：留在台账里，到点再来
                if isinstance(outcome, StreamFullError):
                    _letters_full.say("", stream=EVENTS_DLQ_STREAM, events=len(overdue), remedy=LETTERS_FULL_REMEDY)
                    return
                if outcome is not None:
                    raise outcome


async def _bury(connection: JetStreamConnection, event: WaitingEvent) -> None:
    """流里的原文进死信流；流里已经没有它，就由台账记得的造一封。"""
    original = await _original(connection, event) or _remembered(event)
    await bury_event(connection, original, reason=_reason(event), attempts=event.looks)


async def _original(connection: JetStreamConnection, event: WaitingEvent) -> StoredMessage | None:
    """序号对上了也要看是不是它：流重建之后序号会重来。"""
    if event.sequence == NO_SEQUENCE:
        return None
    found = await stored_message(connection, EVENTS_STREAM, event.sequence)
    try:
        is_it = found is not None and DataImportCompleted.model_validate_json(found.data).event_id == event.event_id
    except ValueError:
        is_it = False
    return found if is_it else None


def _remembered(event: WaitingEvent) -> StoredMessage:
    content = DataImportCompleted(event_id=event.event_id, import_id=event.import_id, occurred_at=event.stored_at)
    if event.allow_deletes:
        content = content.model_copy(update={"allow_deletes": True})
    key = f"-{event.event_id}" if event.sequence == NO_SEQUENCE else ""
    return StoredMessage(
        EVENTS_STREAM, event.sequence, event.stored_at, DATA_IMPORT_COMPLETED, content.model_dump_json().encode(), key
    )


def _reason(event: WaitingEvent) -> str:
    problem = "is not in import_tasks" if event.import_status is None else "is not completed in import_tasks"
    age_seconds = (datetime.now(UTC) - event.stored_at).total_seconds()
    return f"import {event.import_id} {problem}; given up {age_seconds:.0f} s after it was published"
