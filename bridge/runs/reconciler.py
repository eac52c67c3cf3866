"""对账者：门铃可能丢，进程可能死；按时看一眼台账与发件箱，有事没人做就敲门、补发。"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from bridge.errors import tolerate
from bridge.events.due_bell import DueBell
from bridge.events.outbox_publisher import publish_outbox
from bridge.events.unannounced_imports import UnannouncedImports
from bridge.events.waiting_events import WaitingEvents
from bridge.side_tasks import pause, supervised
from etl_assets.core.database_sync import transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.ledger.graph import catch_up

logger = get_logger(__name__)

INTERVAL_SECONDS = 5.0
WAITING_SECONDS = 1.0
# 没人宣布的先要过宽限（默认一分钟）：看得再勤，也早不了多少
UNANNOUNCED_SECONDS = 10.0
# 要看整个台账，而只有升级到一半才有落下的
CATCH_UP_SECONDS = 30.0

_caught_up = RepeatedWarning(logger, "an older version left out assets that it does not know, their days are due now")
_cannot_reconcile = RepeatedWarning(logger, "cannot reconcile now")


async def reconcile(stop: asyncio.Event, bell: DueBell) -> None:
    """每隔几秒对一次账，直到 stop；几件事各做各的，一件做不成不耽误别的。"""
    # 不只靠工人：它被杀了、那时 NATS 不在，发件箱里的就要等到下一个运行才有人发
    publish = partial(publish_outbox, bell.engine, bell.broker.connection)
    unannounced_seconds = min(UNANNOUNCED_SECONDS, bell.settings.unannounced_after_seconds)
    await asyncio.gather(
        _repeat("ring for due days", bell.remind, stop, INTERVAL_SECONDS),
        _repeat("publish completion events", publish, stop, INTERVAL_SECONDS),
        _repeat("look after waiting events", WaitingEvents(bell).look, stop, WAITING_SECONDS),
        _repeat("catch up with older versions", partial(_catch_up, bell), stop, CATCH_UP_SECONDS),
        _repeat("look for unannounced imports", UnannouncedImports(bell).look, stop, unannounced_seconds),
    )


async def _catch_up(bell: DueBell) -> None:
    if await asyncio.to_thread(transact, bell.engine, catch_up, bell.settings.target_schema):
        _caught_up.say("")


async def _repeat(
    name: str, step: Callable[[], Awaitable[object]], stop: asyncio.Event, interval_seconds: float
) -> None:
    """数据库或 NATS 不在就等下一次；别的错由看管它的记下。"""

    async def steps() -> None:
        while not stop.is_set():
            try:
                await step()
            except Exception as error:  # noqa: BLE001  # 不是服务器不在的，原样抛出
                tolerate(error, _cannot_reconcile, task=name)
            await pause(interval_seconds, stop)

    await supervised(name, steps, stop=stop)
