"""到期的日子的门铃：收下了事件就敲；丢了的，对账者想起来再敲。"""

from __future__ import annotations

import asyncio
import time

import sqlalchemy as sa

from bridge.queue.broker import SPARE_REMINDERS, SafeJetStreamBroker
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.settings import Lane
from etl_assets.core.database_sync import transact
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.claims import has_claimable_days
from etl_assets.ledger.leases import leased_run_ids

CROWD = 1_000
"""车道上的消息比在做的运行多出这么多条，再敲也是白敲：没有人在取。"""
_CROWDED_SECONDS = 15.0
"""有期限：我们若再也看不成，监听器照样敲。"""
_LANE: Lane = "event"


class DueBell:
    """有到期的日子时敲门。工人不在，门铃不会越积越多：日子在台账里，等队伍短了对账者再敲。"""

    def __init__(self, broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings) -> None:
        self.broker = broker
        self.engine = engine
        self.settings = settings
        self._crowded_until = 0.0

    async def ring(self, task_name: str = MATERIALIZE_DUE, lane: Lane = _LANE) -> None:
        """收下了事件，或者自己找到了导入。"""
        if time.monotonic() >= self._crowded_until:
            await self.broker.ring(task_name, lane)

    async def remind(self) -> None:
        """有能领的日子，消息却不比在做的运行多：门铃丢了。"""
        claimable, running = await asyncio.to_thread(transact, self.engine, self._look)
        surplus = (await self.broker.lane_depths())[_LANE] - running
        self._crowded_until = time.monotonic() + _CROWDED_SECONDS if surplus > CROWD else 0.0
        if claimable and surplus < SPARE_REMINDERS:
            await self.broker.remind(MATERIALIZE_DUE, _LANE)

    def _look(self, connection: sa.Connection) -> tuple[bool, int]:
        return has_claimable_days(connection, self.settings.target_schema), len(leased_run_ids(connection))
