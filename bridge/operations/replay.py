"""重放 EVENTS 里的事件：直接从流里读，不动监听器的消费者，一批一批地再问台账。"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from nats.aio.msg import Msg

from bridge.errors import InvalidEventError, StreamMissingError
from bridge.events.asset_events import asset_events
from bridge.events.envelope import DataImportCompleted, EtlCompleted
from bridge.events.event_task_utils import EventTaskHandler, ReceivedEvent
from bridge.events.handlers import concerns, handlers_of, import_event, read_own_graph
from bridge.events.subjects import DATA_IMPORT_COMPLETED, completed_asset, etl_completed
from bridge.events.verdicts import receive
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, read_stored, stored_message
from bridge.jetstream.streams import stream_state
from bridge.nats_names import EVENTS_PREFIX, EVENTS_STREAM
from bridge.settings import BridgeSettings
from etl_assets.core.asset_events import Event
from etl_assets.core.business_day import partition_range
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import TransientError
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.intake.replay import replay_completion, replay_imports
from etl_assets.ledger.graph import AssetGraph
from etl_assets.ledger.outbox import installation_id

_ATTEMPTS = 3
_NAMED_PROBLEMS = 50

Verdict = Literal["requested", "skipped", "ignored", "not_completed", "invalid"]
"""requested：要求了日子；skipped：台账说做完了；ignored：与我们无关；not_completed：导入不在或没完成；invalid：不合约定。"""
_VERDICTS: dict[str, Verdict] = {"done": "skipped", "irrelevant": "ignored", "asks for nothing": "ignored"}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """一个没能重放的事件。"""

    sequence: int
    subject: str
    verdict: Verdict
    reason: str


@dataclass
class ReplayReport:
    """读了哪些事件，各是什么结果，碰了哪些分区；problems 只留前几十个。"""

    counts: Counter[Verdict] = field(default_factory=Counter)
    days: dict[str, set[date]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    begins_late_at: int | None = None
    """流里最早的序号；比要求的起点晚，更早的已经不在了。"""

    def complain(self, message: Msg, verdict: Verdict, reason: str) -> None:
        self.counts[verdict] += 1
        if len(self.problems) < _NAMED_PROBLEMS:
            self.problems.append(Problem(message.metadata.sequence.stream, message.subject, verdict, reason))


async def replayable_subjects() -> list[str]:
    return [handler.subject for handler in _replayable(await asyncio.to_thread(read_own_graph))]


def _replayable(graph: AssetGraph) -> list[EventTaskHandler[Any]]:
    """能重放的：台账说得出它们的事件做完了没有，或者再做一遍也没有害处；别的主题的处理器，我们一无所知。"""
    known = {DATA_IMPORT_COMPLETED, *map(etl_completed, graph.names), *asset_events()}
    return [handler for handler in handlers_of(graph) if handler.subject in known]


async def replay_events(
    settings: BridgeSettings,
    *,
    first: int | datetime,
    last_sequence: int | None = None,
    until: datetime | None = None,
    subject: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> ReplayReport:
    """重放一段事件，到开始时流的末尾为止；dry_run 时照样判断，什么也不留下。

    :param last_sequence: 含这个序号。
    :param until: 不含这个时刻。
    """
    graph = await asyncio.to_thread(read_own_graph)
    async with JetStreamConnection(settings, name="replay") as connection:
        state = await stream_state(connection, EVENTS_STREAM)
        if state is None:
            raise StreamMissingError(f"{EVENTS_PREFIX}>")
        replaying = _Replay(settings, graph, subject=subject, force=force, dry_run=dry_run)
        if await _begins_late(connection, state.first_seq, first):
            replaying.report.begins_late_at = state.first_seq
        stretch = Stretch(first, state.last_seq if last_sequence is None else min(last_sequence, state.last_seq))
        # 到了 until 就提前离开：不关上，临时的消费者要等垃圾回收才有人删
        async with contextlib.aclosing(
            read_stored(connection, EVENTS_STREAM, stretch, subjects=sorted(replaying.handlers))
        ) as batches:
            async for messages in batches:
                in_time = [message for message in messages if until is None or message.metadata.timestamp < until]
                await replaying.take(in_time)
                if len(in_time) < len(messages):
                    break
        return replaying.report


async def _begins_late(connection: JetStreamConnection, first_sequence: int, first: int | datetime) -> bool:
    if first_sequence <= 1:
        return False
    if isinstance(first, int):
        return first < first_sequence
    oldest = await stored_message(connection, EVENTS_STREAM, first_sequence)
    return oldest is not None and first < oldest.stored_at


class _Replay:
    """一次重放：怎样判断一批事件，判断到哪里了。"""

    def __init__(
        self, settings: BridgeSettings, graph: AssetGraph, *, subject: str | None, force: bool, dry_run: bool
    ) -> None:
        self._graph = graph
        self.handlers = {
            handler.subject: handler for handler in _replayable(graph) if subject in (None, handler.subject)
        }
        self._max_bytes = settings.event_max_bytes
        self._force = force
        self._dry_run = dry_run
        self.report = ReplayReport(days={asset: set() for asset in graph.names})

    async def take(self, messages: Sequence[Msg]) -> None:
        """一批：不合约定的记下来，其余按主题问台账，每个主题一个事务。"""
        valid: dict[str, list[tuple[Msg, ReceivedEvent[Any]]]] = {subject: [] for subject in self.handlers}
        for message in messages:
            try:
                received = receive(self.handlers[message.subject], message, max_bytes=self._max_bytes)
            except InvalidEventError as error:
                self.report.complain(message, "invalid", error.reason)
            else:
                valid[message.subject].append((message, received))
        for subject, events in valid.items():
            if events and subject == DATA_IMPORT_COMPLETED:
                await self._take_imports(events)
            elif events and subject in asset_events():
                await self._take_of_asset(subject, [received.event for _, received in events])
            elif events:
                await self._take_completions(completed_asset(subject) or "", [received for _, received in events])

    async def _take_imports(self, events: Sequence[tuple[Msg, ReceivedEvent[DataImportCompleted]]]) -> None:
        asked = [import_event(received) for _, received in events]
        replayed = await self._in_transaction(
            lambda connection, settings: replay_imports(connection, settings, asked, force=self._force)
        )
        for (message, received), outcome in zip(events, replayed.outcomes, strict=True):
            if outcome in ("pending", "missing"):
                problem = "is not completed in import_tasks" if outcome == "pending" else "is not in import_tasks"
                self.report.complain(message, "not_completed", f"import {received.event.import_id} {problem}")
            else:
                self.report.counts[_VERDICTS.get(outcome, "requested")] += 1
        for asset in self._graph.names:
            self.report.days[asset] |= set(replayed.days)

    async def _take_completions(self, asset: str, events: Sequence[ReceivedEvent[EtlCompleted]]) -> None:
        """同一天的几个事件以最晚的为准：它都有人接着做了，更早的也一样。"""

        def ask(connection: sa.Connection, settings: EtlSettings) -> tuple[list[set[date]], Collection[date]]:
            own, partitions = str(installation_id(connection)), partition_range(settings)
            of_events = [
                {day for day in received.event.partitions if partitions.first <= day <= partitions.last}
                if concerns(received.event, own, settings.target_schema)
                else set()
                for received in events
            ]
            newest: dict[date, datetime] = {}
            for received, days in zip(events, of_events, strict=True):
                newest |= dict.fromkeys(days, received.published_at)
            return of_events, replay_completion(connection, settings.target_schema, asset, newest, force=self._force)

        of_events, asked = await self._in_transaction(ask)
        for days in of_events:
            self.report.counts["ignored" if not days else "requested" if days & set(asked) else "skipped"] += 1
        for later in self._graph.descendants(asset):
            self.report.days[later] |= set(asked)

    async def _take_of_asset(self, subject: str, events: Sequence[Event]) -> None:
        """资产自己认得的事件，台账不记哪个做完了：都再要求一遍。"""
        handle = asset_events()[subject].handle
        for asked in await self._in_transaction(lambda connection, settings: handle(connection, settings, events)):
            self.report.counts["requested" if asked.days else "ignored"] += 1
            for asset in {asked.asset} | self._graph.descendants(asked.asset):
                self.report.days[asset] |= set(asked.days)

    async def _in_transaction(self, ask: Callable[[sa.Connection, EtlSettings], Result]) -> Result:
        """别的运行挡着就再来；没有监听器替我们重投。"""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(TransientError):
                return await asyncio.to_thread(self._ask, ask)
        return await asyncio.to_thread(self._ask, ask)

    def _ask(self, ask: Callable[[sa.Connection, EtlSettings], Result]) -> Result:
        with translated_errors(), get_engine().connect() as connection, connection.begin() as transaction:
            result = ask(connection, get_settings())
            if self._dry_run:
                transaction.rollback()
            return result
