"""在进程旁边看着：隔一会儿看一眼什么不对，还没说过的说给每个地址听。

在自己的线程、自己的连接里，每一步都有时限：webhook 慢了、哑了，数据照走。几个进程里只有一个在看（etl.alert_watches）；
先送到再记下，死在两步之间的，接手的人再说一遍，至多一遍。
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from bridge.alerts.messages import Message, messages_for, where_we_are
from bridge.alerts.rules import Alert, database_alert, find_alerts, seen_sources
from bridge.alerts.webhooks import Channel, channels_of
from bridge.errors import tolerate
from bridge.operations.overview import look_at_database, look_at_the_rest
from bridge.settings import BridgeSettings
from bridge.side_tasks import supervised
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_errors import fault_of
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.errors import EtlError, SettingsError, StatementTimeoutError, TransientError
from etl_assets.core.log import RepeatedWarning, get_logger, process_name, redact
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.alerts import claim_watch, forget_alerts, note_said, read_alerts, store_alerts

logger = get_logger(__name__)

INTERVAL_SECONDS = 30.0
LEASE_SECONDS = 120.0
"""比最久的一眼长：看一遍，一条消息。每条消息之前续一次。"""
WORKER_PATIENCE_SECONDS = 60.0
"""监听器先看；它们都不在了，工人才接过来：没有人监听，由他们说。"""
RETRY = Backoff(first_seconds=30.0, longest_seconds=900.0)
_STATEMENT_SECONDS = 30

_not_taken = RepeatedWarning(logger, "an alert was not taken, trying again later")
_cannot_look = RepeatedWarning(logger, "cannot look for what is wrong now")


@dataclass
class _Attempts:
    """一个地址连着几次没有收下，何时再试；进程换了从头数。"""

    failures: int = 0
    next_at: float = 0.0


@dataclass
class _Outage:
    """数据库不在了：没有地方记说过什么，记在这里；由最后看着的那个进程说。"""

    since: float = field(default_factory=time.monotonic)
    problem: str = ""
    said: set[str] = field(default_factory=set)


class AlertWatch:
    """一个进程的看守。"""

    def __init__(
        self,
        engine: sa.Engine,
        settings: EtlSettings,
        bridge_settings: BridgeSettings,
        *,
        state_dir: Path,
        patience_seconds: float = 0.0,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._bridge_settings = bridge_settings
        self._state_dir = state_dir
        self._patience_seconds = patience_seconds
        self._watcher = f"{process_name()}:{uuid4().hex[:8]}"
        self._attempts: defaultdict[str, _Attempts] = defaultdict(_Attempts)
        self._is_watching = False
        self._outage: _Outage | None = None

    @cached_property
    def _channels(self) -> list[Channel]:
        """不认识的地址说一声，别的照用。轮到自己说的时候才载入 apprise：它要一两秒、十几 MB。"""
        usable = []
        for channel in channels_of(self._bridge_settings.alert_urls):
            try:
                channel.check()
            except SettingsError as error:
                logger.error("an address for alerts cannot be used", error=str(error))
            else:
                usable.append(channel)
        return usable

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def look(self) -> None:
        """看一眼，说该说的；数据库不在也说。"""
        try:
            self._is_watching = self._claim()
            if self._is_watching:
                await self._look()
        except Exception as error:  # noqa: BLE001  # 不是服务器的事的，原样抛出
            fault = fault_of(error)
            # 忙得答不出的也算不在：太忙的时候正该有人说
            if not isinstance(fault, StatementTimeoutError):
                tolerate(error, _cannot_look)
            # 别的进程看着的时候坏的，由它说：不然几个进程各说一遍
            if self._is_watching and isinstance(fault, TransientError | StatementTimeoutError):
                self._outage = self._outage or _Outage()
                self._outage.problem = redact(str(fault))
                self._tell_of_outage(is_over=False)
        else:
            self._tell_of_outage(is_over=True)

    async def _look(self) -> None:
        target = self._settings.target_schema
        overview = look_at_database(self._engine, self._settings)
        overview = await look_at_the_rest(overview, self._bridge_settings, state_dir=self._state_dir)
        # 在内存里说着的那件，不再说一遍
        found = [
            alert
            for alert in find_alerts(overview, self._bridge_settings)
            if alert.is_stored and not (self._outage and alert.key == "database")
        ]
        transact(self._engine, store_alerts, target, list(map(_stored, found)), sources=seen_sources(overview))
        transact(self._engine, forget_alerts, target, [channel.name for channel in self._channels])
        rows = transact(self._engine, read_alerts, target)
        for channel in self._channels:
            for message in self._messages(rows, channel):
                # 慢的地址也许占了很久：别人接过去了的，由别人说
                if not self._claim() or not self._send(channel, message):
                    break
                transact(self._engine, note_said, target, channel.name, message.said)

    def _claim(self) -> bool:
        return transact(
            self._engine,
            claim_watch,
            self._settings.target_schema,
            self._watcher,
            lease_seconds=LEASE_SECONDS,
            patience_seconds=self._patience_seconds,
        )

    def _messages(self, rows: Sequence[Any], channel: Channel) -> list[Message]:
        language, where = self._bridge_settings.alert_language, where_we_are(self._settings.target_schema)
        return messages_for(rows, channel.name, language=language, where=where, zone=self._settings.zone)

    def _send(self, channel: Channel, message: Message) -> bool:
        """收下了没有；没有收下的越隔越久再试。"""
        attempts = self._attempts[channel.name]
        if time.monotonic() < attempts.next_at:
            return False
        try:
            channel.send(message)
        except EtlError as error:
            attempts.failures += 1
            pause_seconds = RETRY.seconds(attempts.failures)
            attempts.next_at = time.monotonic() + pause_seconds
            _not_taken.say(channel.name, channel=channel.name, error=str(error), next_in_seconds=pause_seconds)
            return False
        attempts.failures = 0
        logger.info("told what is wrong", channel=channel.name, alerts=len(message.said), over=message.is_over)
        return True

    def _tell_of_outage(self, *, is_over: bool) -> None:
        """数据库不在、又在了。"""
        outage = self._outage
        if outage is None:
            return
        alert = database_alert(outage.problem)
        lasted = time.monotonic() - outage.since
        if not is_over and lasted < alert.settle_seconds:
            return
        for channel in self._channels:
            row = {**_row_of_outage(alert, lasted), "said": dict.fromkeys(outage.said, 1), "over_at": is_over or None}
            for message in self._messages([row], channel):
                if self._send(channel, message):
                    (outage.said.discard if is_over else outage.said.add)(channel.name)
        if is_over and not outage.said:
            self._outage = None


def start_watching(settings: EtlSettings, bridge_settings: BridgeSettings, state_dir: Path, *, in_worker: bool) -> None:
    """在自己的线程里看着，进程结束它就结束；没有设 ETL_ALERT_URLS 就什么也不做。"""
    if not bridge_settings.alert_urls:
        return

    async def watch() -> None:
        own = {"pool_size": 1, "statement_timeout_seconds": _STATEMENT_SECONDS, "lock_timeout_seconds": 5}
        engine = build_engine(settings.model_copy(update=own))
        patience_seconds = WORKER_PATIENCE_SECONDS if in_worker else 0.0
        try:
            await AlertWatch(
                engine, settings, bridge_settings, state_dir=state_dir, patience_seconds=patience_seconds
            ).run()
        finally:
            engine.dispose()

    context = contextvars.copy_context()  # 日志里是哪个进程
    threading.Thread(
        target=context.run, args=(lambda: asyncio.run(supervised("alerts", watch)),), name="alerts", daemon=True
    ).start()


def _stored(alert: Alert) -> dict[str, Any]:
    return {name: value for name, value in asdict(alert).items() if name != "is_stored"}


def _row_of_outage(alert: Alert, lasted_seconds: float) -> dict[str, Any]:
    since = datetime.now(UTC) - timedelta(seconds=lasted_seconds)
    return {**_stored(alert), "since": since, "is_due": True, "may_grow": False}
