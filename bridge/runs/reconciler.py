"""对账者：门铃可能丢，进程可能死；按时看一眼台账与发件箱，有事没人做就敲门、补发。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import sqlalchemy as sa

from bridge.errors import tolerate
from bridge.events.outbox_publisher import publish_outbox
from bridge.events.unannounced_imports import UnannouncedImports
from bridge.events.waiting_events import WaitingEvents
from bridge.queue.broker import SPARE_REMINDERS, SafeJetStreamBroker
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.settings import Lane
from bridge.side_tasks import pause, supervised
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.claims import has_claimable_days
from etl_assets.ledger.leases import leased_run_ids

logger = get_logger(__name__)

INTERVAL_SECONDS = 5.0
WAITING_SECONDS = 1.0
UNANNOUNCED_SECONDS = 10.0
CROWD = 1_000
"""车道上的消息比在做的运行多出这么多条，再敲也是白敲：没有人在取。"""
_LANE: Lane = "event"

_cannot_reconcile = RepeatedWarning(logger, "cannot reconcile now")


class DueBell:
    """有到期的日子时敲门。工人不在，门铃不会越积越多：日子在台账里，等队伍短了对账者再敲。"""

    def __init__(self, broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings) -> None:
        self._broker = broker
        self._engine = engine
        self._settings = settings
        self._crowded_until = 0.0

    async def ring(self, task_name: str, lane: Lane) -> None:
        """收下了事件，或者自己找到了导入。"""
        if time.monotonic() >= self._crowded_until:
            await self._broker.ring(task_name, lane)

    async def remind(self) -> None:
        """有能领的日子，消息却不比在做的运行多：门铃丢了。"""
        claimable, running = await asyncio.to_thread(self._look)
        surplus = (await self._broker.lane_depths())[_LANE] - running
        # 有期限：我们若再也看不成，监听器照样敲
        self._crowded_until = time.monotonic() + 3 * INTERVAL_SECONDS if surplus > CROWD else 0.0
        if claimable and surplus < SPARE_REMINDERS:
            await self._broker.remind(MATERIALIZE_DUE, _LANE)

    def _look(self) -> tuple[bool, int]:
        with translated_errors(), self._engine.connect() as connection:
            return has_claimable_days(connection, self._settings.target_schema), len(leased_run_ids(connection))


async def reconcile(stop: asyncio.Event, *, bell: DueBell, broker: SafeJetStreamBroker, engine: sa.Engine, settings: EtlSettings) -> None:
    """每隔几秒对一次账，直到 stop；几件事各做各的，一件做不成不耽误别的。"""
    publish = partial(publish_outbox, engine, broker.connection)
    waiting = WaitingEvents(ring=bell.ring, broker=broker, engine=engine, settings=settings)
    unannounced = UnannouncedImports(ring=bell.ring, broker=broker, engine=engine, settings=settings)
    await asyncio.gather(
        _repeat("ring for due days", bell.remind, stop, INTERVAL_SECONDS),
        _repeat("publish completion events", publish, stop, INTERVAL_SECONDS),
        _repeat("look after waiting events", waiting.look, stop, WAITING_SECONDS),
        _repeat("look for unannounced imports", unannounced.look, stop, UNANNOUNCED_SECONDS),
    )


async def _repeat(name: str, step: Callable[[], Awaitable[object]], stop: asyncio.Event, interval_seconds: float) -> None:
    """数据库或 NATS 不在就等下一次；别的错由看管它的记下。"""

    async def steps() -> None:
        while not stop.is_set():
            try:
                await step()
            except Exception as error:  # noqa: BLE001  # 不是服务器不在的，原样抛出
                tolerate(error, _cannot_reconcile, task=name)
            await pause(interval_seconds, stop)

    await supervised(name, steps, stop=stop)
