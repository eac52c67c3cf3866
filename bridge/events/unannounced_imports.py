"""没有人宣布的导入，完成的与撤回的：监听器过了宽限自己把它们要进台账。"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

from bridge.events.due_bell import DueBell
from bridge.events.handled_events import backlog_begins_at
from etl_assets.core.database_sync import transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.intake.unannounced_imports import BITE, Walk, remember_changed, remember_unannounced
from etl_assets.reports.lookups import completion_lookup, is_served

logger = get_logger(__name__)

WITHOUT_INDEX_SECONDS = 60.0
"""没有索引，每次都要读整张 import_tasks：少看几回。"""

_found = RepeatedWarning(logger, "imports that no event announced were found, they are taken in now")
_changed = RepeatedWarning(logger, "imports changed their status and no event said so, they are taken in now")


class UnannouncedImports:
    """监听器里看着它们的那一个；几个监听器时一次只有一个在看。"""

    def __init__(self, bell: DueBell) -> None:
        self._bell = bell
        self._look_at = 0.0
        self._walk = Walk()
        self._walk_at = 0.0

    async def look(self) -> None:
        """记下的由看着等导入的事件的去要求；满满一批就接着看。事件还排着队的导入不算。"""
        bell = self._bell
        handled_until = await backlog_begins_at(bell.broker.connection, bell.broker.settings)
        if time.monotonic() >= self._look_at:
            await self._look_for_silent(handled_until)
        if handled_until is None and time.monotonic() >= self._walk_at:
            await self._look_for_changed()

    async def _look_for_silent(self, handled_until: datetime | None) -> None:
        bell, settings = self._bell, self._bell.settings
        if not await asyncio.to_thread(transact, bell.engine, is_served, completion_lookup()):
            self._look_at = time.monotonic() + WITHOUT_INDEX_SECONDS
        more = True
        while more:
            found = await asyncio.to_thread(remember_unannounced, bell.engine, settings, handled_until=handled_until)
            more = len(found) == BITE
            if found:
                _found.say(
                    "", imports=len(found), first=str(found[0]), after_seconds=settings.unannounced_after_seconds
                )

    async def _look_for_changed(self) -> None:
        """走一步；一圈走完，过了宽限才走下一圈：刚改的，事件正在路上。"""
        bell, settings = self._bell, self._bell.settings
        lost = await asyncio.to_thread(remember_changed, bell.engine, settings, self._walk)
        if lost:
            _changed.say("", imports=len(lost), first=str(lost[0]), after_seconds=settings.unannounced_after_seconds)
        if self._walk.is_at_start:
            self._walk_at = time.monotonic() + settings.unannounced_after_seconds
