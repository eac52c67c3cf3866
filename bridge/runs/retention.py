"""过了保留期的每天清一次：一个工人在旁边一小口一小口地清，一口一个短事务，两口之间歇一样久。

清哪些见 `intake/retention.py`（台账）、`warm_dagster/old_runs.py`（Dagster）；死信流里太老的死信也在这里。
别的流各有自己的期限与上限（EVENTS 30 天、TASKS 做完就没有、TASKS_FORGIVEN 7 天），不归它管。
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID
from zoneinfo import ZoneInfo

import sqlalchemy as sa

from bridge.errors import tolerate
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, delete_messages_before, read_stored, stored_message
from bridge.jetstream.streams import stream_state
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM, TASKS_DLQ_STREAM
from bridge.settings import BridgeSettings
from bridge.warm_dagster.old_runs import dagster_database, prune_dagster
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import EtlError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.retention import prune_ledger
from etl_assets.ledger.pruning import claim_pruning, extend_pruning, release_pruning, runs_in_use

logger = get_logger(__name__)

HOUR = 4
"""业务时区里每天这个时候起：夜里的检查三点半开始。机器那时关着的，开了就清。"""
PRUNED = (
    *("runs", "run_events", "check_results", "ticks", "backfills", "dead_letters"),
    *("import_events", "import_requests", "rejected_rows", "imported_files", "completion_events"),
)
"""清的各是什么：`prune` 给出的名字。"""
LOOK_SECONDS = 60.0
CLAIM_SECONDS = 120.0
"""比哪一口都久：死了的清到一半，过这么久别人从头再清。"""
AGAIN_SECONDS = 600.0
"""一处清不了，过这么久才从头再来。"""
_SHORTEST_PAUSE_SECONDS = 0.02

_cannot_prune = RepeatedWarning(logger, "cannot prune now")


@dataclass(frozen=True)
class Pruning:
    """清一次要的：两个数据库、NATS、保留多久。"""

    engine: sa.Engine
    settings: EtlSettings
    bridge_settings: BridgeSettings
    connection: JetStreamConnection
    dagster_url: str | None
    """Dagster 的存储不在 PostgreSQL 里（测试的 SQLite）就是 None，不清它。"""


async def keep_pruning(pruning: Pruning) -> None:
    """工人旁边的活：到了时候就清，没到、别人正在清就什么也不做。"""
    swept_at = -float("inf")
    while True:
        await asyncio.sleep(LOOK_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311  # 只为错开时间
        try:
            if time.monotonic() - swept_at > timedelta(days=1).total_seconds():
                swept_at = time.monotonic()
                await asyncio.to_thread(sweep_run_folders, pruning.bridge_settings)
            removed = await prune(pruning, due_since=last_hour(datetime.now(UTC), pruning.settings.zone))
            if removed is not None:
                logger.info(
                    "pruned what was kept long enough", **{name: count for name, count in removed.items() if count}
                )
        except Exception as error:  # noqa: BLE001  # 不是服务器不在的，原样抛出
            tolerate(error, _cannot_prune)


def last_hour(now: datetime, zone: ZoneInfo) -> datetime:
    """最近一次到了该清的时候。"""
    local = now.astimezone(zone)
    today = local.replace(hour=HOUR, minute=0, second=0, microsecond=0)
    return today if today <= local else today - timedelta(days=1)


async def prune(pruning: Pruning, *, dry_run: bool = False, due_since: datetime | None = None) -> Counter[str] | None:
    """清一次，返回清了什么；别人正在清、due_since 之后清完过，是 None。一处清不了，别处照清，最后才抛错。

    :param dry_run: 只数，什么也不动，不管有没有人正在清。
    """
    engine = pruning.engine
    if not dry_run and not await asyncio.to_thread(
        transact, engine, claim_pruning, due_since=due_since, seconds=CLAIM_SECONDS
    ):
        return None
    removed: Counter[str] = Counter()
    failed: EtlError | None = None
    try:
        for step in (_prune_ledger, _prune_dagster, _prune_letters):
            try:
                removed += await step(pruning, dry_run=dry_run)
            except EtlError as error:
                failed = failed or error
    except BaseException:
        failed = failed or EtlError("stopped")
        raise
    finally:
        if not dry_run:
            # 人要的，马上可以再要；自己清的，同样的缘由多半还在
            pause_seconds = AGAIN_SECONDS if failed is not None and due_since is not None else 0.0
            await asyncio.to_thread(
                transact, engine, release_pruning, is_finished=failed is None, again_in_seconds=pause_seconds
            )
    if failed is not None:
        raise failed
    return removed


async def _prune_ledger(pruning: Pruning, *, dry_run: bool) -> Counter[str]:
    before = datetime.now(UTC) - timedelta(days=pruning.settings.retention_ledger_days)
    oldest = await _oldest_event_at(pruning.connection)
    return await _take_bites(pruning, prune_ledger(pruning.engine, before=before, oldest_event=oldest, dry_run=dry_run))


async def _prune_dagster(pruning: Pruning, *, dry_run: bool) -> Counter[str]:
    if pruning.dagster_url is None:
        return Counter()
    wanted = await asyncio.to_thread(transact, pruning.engine, runs_in_use)
    before = datetime.now(UTC) - timedelta(days=pruning.bridge_settings.retention_runs_days)
    with dagster_database(pruning.dagster_url) as database:
        return await _take_bites(pruning, prune_dagster(database, before=before, wanted=wanted, dry_run=dry_run))


async def _take_bites(pruning: Pruning, bites: Iterator[Counter[str]]) -> Counter[str]:
    """一口一口地来，歇得与做得一样久：别人总有一半的工夫。"""
    removed: Counter[str] = Counter()
    extended_at = time.monotonic()
    while True:
        started_at = time.monotonic()
        bite = await asyncio.to_thread(next, bites, None)
        if bite is None:
            return removed
        removed += bite
        if time.monotonic() - extended_at > CLAIM_SECONDS / 4:
            await asyncio.to_thread(transact, pruning.engine, extend_pruning, seconds=CLAIM_SECONDS)
            extended_at = time.monotonic()
        await asyncio.sleep(max(time.monotonic() - started_at, _SHORTEST_PAUSE_SECONDS))


# ---- NATS ---------------------------------------------------------------------------


async def _oldest_event_at(connection: JetStreamConnection) -> datetime | None:
    """流里最早的事件何时存下；没有流、流是空的是 None。"""
    state = await stream_state(connection, EVENTS_STREAM)
    oldest = await stored_message(connection, EVENTS_STREAM, state.first_seq) if state and state.messages else None
    return None if oldest is None else oldest.stored_at


async def _prune_letters(pruning: Pruning, *, dry_run: bool) -> Counter[str]:
    """很久没有人动的死信；流满了就不再收，那时该埋的留在原来的流里。"""
    before = datetime.now(UTC) - timedelta(days=pruning.bridge_settings.retention_dead_letters_days)
    removed: Counter[str] = Counter()
    for stream in (EVENTS_DLQ_STREAM, pruning.bridge_settings.own_name(TASKS_DLQ_STREAM)):
        count, following = await _letters_before(pruning.connection, stream, before)
        if count and not dry_run:
            await delete_messages_before(pruning.connection, stream, following)
        removed["dead_letters"] += count
    return removed


async def _letters_before(connection: JetStreamConnection, stream: str, before: datetime) -> tuple[int, int]:
    """有几封在那之前存下，与它们后面的序号。"""
    state = await stream_state(connection, stream)
    count = following = 0
    if state is None or not state.messages:
        return count, following
    stretch = Stretch(state.first_seq, state.last_seq)
    async with contextlib.aclosing(read_stored(connection, stream, stretch, headers_only=True)) as batches:
        async for messages in batches:
            old = [message.metadata for message in messages if message.metadata.timestamp < before]
            if old:
                count, following = count + len(old), old[-1].sequence.stream + 1
            if len(old) < len(messages):
                break
    return count, following


# ---- 这台机器上的文件 -----------------------------------------------------------------


def sweep_run_folders(settings: BridgeSettings) -> int:
    """运行在 DAGSTER_HOME 里各自的文件夹（截取的输出、没有写明去处的产物）；返回删了几个。

    `etl up` 写的 dagster.yaml 不截取输出，那里就没有；自己写的也许截取。
    """
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return 0
    oldest = time.time() - timedelta(days=settings.retention_runs_days).total_seconds()
    swept = 0
    for storage in (Path(home) / "storage", Path(home) / "artifacts" / "storage"):
        with contextlib.suppress(OSError):  # 进不去的、别的工人刚删了的：不是清别处的障碍
            for folder in storage.iterdir():
                swept += _is_run_id(folder.name) and _sweep(folder, oldest)
    return swept


def _sweep(folder: Path, oldest: float) -> bool:
    with contextlib.suppress(OSError):
        if folder.is_dir() and not folder.is_symlink() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
            return True
    return False


def _is_run_id(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False
