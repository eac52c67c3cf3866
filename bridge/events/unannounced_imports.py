"""没有人宣布的导入：监听器过了宽限自己把它们要进台账。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from bridge.events.handled_events import backlog_begins_at
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.settings import Lane
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.unannounced_imports import BITE, request_unannounced
from etl_assets.reports.lookups import completion_lookup, is_served

logger = get_logger(__name__)

WITHOUT_INDEX_SECONDS = 60.0
"""没有索引，每次都要读整张 import_tasks：少看几回。"""

_taken_in = RepeatedWarning(logger, "imports that no event announced were taken in")


class UnannouncedImports:
    """监听器里看着它们的那一个；几个监听器时一次只有一个在看。"""

    def __init__(
        self, *, ring: Callable[[str, Lane], Awaitable[None]], broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings
    ) -> None:
        self._ring = ring
        self._broker = broker
        self._engine = engine
        self._settings = settings
        self._look_at = 0.0

    async def look(self) -> None:
        """满满一批都要求了就接着看；事件还排着队的导入不算。"""
        if time.monotonic() < self._look_at:
            return
        if not await asyncio.to_thread(self._has_index):
            self._look_at = time.monotonic() + WITHOUT_INDEX_SECONDS
        handled_until = await backlog_begins_at(self._broker.connection, self._broker.settings)
        more = True
        while more:
            requested = await asyncio.to_thread(self._request, handled_until)
            more = len(requested) == BITE
            if requested:
                _taken_in.say("", imports=len(requested), first=str(requested[0]), after_seconds=self._settings.unannounced_after_seconds)
                await self._ring(MATERIALIZE_DUE, "event")

    def _has_index(self) -> bool:
        with translated_errors(), self._engine.connect() as connection:
            return is_served(connection, completion_lookup())

    def _request(self, handled_until: datetime | None) -> Sequence[UUID]:
        with translated_errors():
            return request_unannounced(self._engine, self._settings, handled_until=handled_until)
