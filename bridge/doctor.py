"""`etl doctor` 看的每一项：是什么样，不对的该怎么办。只看，不改。"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from nats.js.api import StreamConfig

from bridge.broker import TASKS_DLQ_STREAM, TASKS_STREAM, task_streams
from bridge.events.envelope import IMPORT_STATUSES, DataImportCompleted
from bridge.events.subjects import DATA_IMPORT_COMPLETED, EVENTS_DLQ_STREAM, EVENTS_STREAM
from bridge.handled_events import handled_up_to
from bridge.jetstream import LETTERS_FULL_REMEDY, NEARLY_FULL, JetStreamConnection, StreamUse
from bridge.listener import CONSUMER, DEAD_LETTERS, consumer_names
from bridge.settings import LANES, BridgeSettings
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import EtlError
from etl_assets.core.settings import EtlSettings
from etl_assets.migrations.upgrade import MINIMUM_SERVER_VERSION, missing_migrations
from etl_assets.services import health, reports
from etl_assets.services.readiness import assert_usable, assert_writable
from etl_assets.services.table_checks import CHECKS, count_violations
from etl_assets.services.troubles import recent_troubles
from etl_assets.services.unannounced_imports import has_completion_index

State = Literal["ok", "warning", "error"]
_REFUSES = 0.98
_LIMITS = ("max_bytes", "max_msgs", "max_age", "max_msg_size", "max_msgs_per_subject", "discard", "retention", "duplicate_window")
_LEAST_FREE_BYTES = 1 << 30
_WAITS_LONG = timedelta(minutes=1)


@dataclass(frozen=True)
class Finding:
    """一项检查的结果；不是 ok 的，says 也说怎么办。"""

    check: str
    state: State
    says: str


def examine(engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, *, state_dir: Path) -> Iterator[Finding]:
    """逐项看过去；服务器不在的，靠它的那些项不看。"""
    yield _free_disk(state_dir)
    database = _attempt("postgres", lambda: _server(engine))
    yield database
    nats = _attempt("nats", lambda: asyncio.run(_nats(bridge_settings)))
    yield nats
    if database.state != "error":
        schema = _attempt("schema", lambda: _schema(engine, settings))
        yield schema
        yield _dagster_home()
        if schema.state != "error":
            yield from _attempts("ledger", lambda: _ledger(engine, settings))
            yield from _attempts("side tasks", lambda: _side_tasks(engine))
            yield from _attempts("table checks", lambda: _tables(engine, settings))
    if nats.state != "error":
        yield from _attempts("queues", lambda: asyncio.run(_queues(bridge_settings)))
        if database.state != "error":
            yield from _attempts("newest event", lambda: _newest_event(engine, settings, bridge_settings))


def _attempts(check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """看不下去的也是一项发现，不耽误别的。"""
    try:
        with translated_errors():
            return list(look())
    except EtlError as error:
        return [Finding(check, "error", str(error))]


def _attempt(check: str, look: Callable[[], Finding]) -> Finding:
    (finding,) = _attempts(check, lambda: [look()])
    return finding


# ---- 服务器 -------------------------------------------------------------------------


def _free_disk(state_dir: Path) -> Finding:
    folder = next(parent for parent in (state_dir, *state_dir.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    says = f"{free / (1 << 30):.1f} GiB free at {folder}"
    return Finding("disk", "ok", says) if free > _LEAST_FREE_BYTES else Finding("disk", "warning", f"{says}: free some space")


def _server(engine: sa.Engine) -> Finding:
    with engine.connect() as connection:
        number, version = connection.execute(
            sa.text("SELECT current_setting('server_version_num')::int, current_setting('server_version')")
        ).one()
        if number < MINIMUM_SERVER_VERSION:
            return Finding("postgres", "error", f"version {version}: upgrade to {MINIMUM_SERVER_VERSION // 10000} or newer")
        assert_writable(connection)
    return Finding("postgres", "ok", f"version {version}")


def _schema(engine: sa.Engine, settings: EtlSettings) -> Finding:
    if missing := missing_migrations(engine):
        return Finding("schema", "error", f"{len(missing)} migrations are missing ({', '.join(missing)}): run `etl init-db`")
    with engine.connect() as connection:
        assert_usable(connection, settings.target_schema)
    return Finding("schema", "ok", f"the tables in {settings.target_schema} match the contract")


def _dagster_home() -> Finding:
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return Finding("dagster", "warning", "DAGSTER_HOME is not set here: workers need it, see `etl env`")
    if not (Path(home) / "dagster.yaml").exists():
        return Finding("dagster", "error", f"there is no dagster.yaml in DAGSTER_HOME ({home}): start `etl up` once, or write one")
    return Finding("dagster", "ok", f"dagster {importlib.metadata.version('dagster')}, {home}")


async def _nats(settings: BridgeSettings) -> Finding:
    connection = JetStreamConnection(settings, name="doctor")
    await connection.open()
    version = connection.client.connected_server_version
    await connection.close()
    return Finding("nats", "ok", f"version {version}, JetStream")


# ---- 台账与表 -----------------------------------------------------------------------


def _ledger(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    with engine.connect() as connection:
        held = reports.held_days(connection, settings)
        silent = health.unannounced_imports(connection, settings)
        unasked = health.unasked_days(connection, settings)
        nowhere = health.rows_nowhere(connection, settings)
        waiting = reports.count_waiting_events(connection, settings)
        aside = reports.set_aside_events(connection)
        indexed = has_completion_index(connection)
    if waiting.oldest is not None and datetime.now(UTC) - waiting.oldest > _WAITS_LONG:
        yield Finding(
            "waiting events",
            "warning",
            f"{waiting.events:,} events wait for imports that are not completed in import_tasks, the oldest since {waiting.oldest}; "
            "each is dead-lettered ETL_EVENT_RETRY_SECONDS after it was published: do the imports commit?",
        )
    if aside.events:
        yield Finding(
            "completion events", "warning", f"{aside.events:,} cannot be published and are tried again every ten minutes: {aside.problem}"
        )
    if not indexed:
        yield Finding(
            "import_tasks",
            "warning",
            "imports that nobody announced are looked for once a minute by reading the whole table: "
            "CREATE INDEX CONCURRENTLY ix_import_tasks_completed_at ON public.import_tasks (completed_at)",
        )
    if held:
        first = held[0]
        yield Finding("held days", "warning", f"{first['day']} of {first['asset']} is held ({first['held_reason']}); see `etl status`")
    if silent:
        yield Finding(
            "announced imports",
            "error",
            f"{len(silent)} completed imports are not in the ledger and the listener does not take them in by itself (it was not running, "
            f"or completed_at is empty, or more than an hour off, or before the first start), the oldest is {silent[0]}: `etl replay`, "
            f"or `etl publish {DATA_IMPORT_COMPLETED}` for each",
        )
    for check, found, problem in (
        ("ledger", unasked, "raw rows lie on days that the ledger was never asked for"),
        ("tables", nowhere, "raw rows of days that the ledger calls done are neither in orders nor rejected"),
    ):
        if found:
            remedy = f"was a backup restored? `etl backfill --from {found.first} --to {found.last}` makes these days again"
            yield Finding(check, "error", f"{found.rows:,} {problem} ({found.first} to {found.last}): {remedy}")
    if not (held or silent or unasked or nowhere):
        yield Finding("ledger", "ok", "every raw row is accounted for")


def _side_tasks(engine: sa.Engine) -> Iterator[Finding]:
    """进程旁边的活（对账、补发……）最近一小时里无故结束过没有。"""
    with engine.connect() as connection:
        found = recent_troubles(connection)
    for trouble in found:
        says = f"'{trouble['task']}' of {trouble['process']} ended {trouble['times']} times, the last at {trouble['last_at']:%H:%M:%S %Z}"
        remedy = "it was started again; if it goes on, look into the log of that process and report it"
        yield Finding("side tasks", "error", f"{says} ({trouble['message']}): {remedy}")
    if not found:
        yield Finding("side tasks", "ok", "none has ended in the last hour")


def _tables(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    wrong = [
        f"{asset} {name} ({violations:,})"
        for asset in CHECKS
        for name, violations in count_violations(engine, settings, asset, None).items()
        if violations
    ]
    remedy = "make the days again with `etl backfill`; if it stays, something else writes these tables"
    yield Finding("table checks", "error", f"{', '.join(wrong)}: {remedy}") if wrong else Finding("table checks", "ok", "all pass")


# ---- 队列 ---------------------------------------------------------------------------


async def _queues(settings: BridgeSettings) -> list[Finding]:
    connection = JetStreamConnection(settings, name="doctor")
    await connection.open()
    own = settings.own_name
    try:
        findings = [_fullness(stream, await connection.stream_use(stream)) for stream in (EVENTS_STREAM, own(TASKS_STREAM))]
        listened = await consumer_names(settings, connection) or [own(CONSUMER)]
        for stream, consumer in [*((EVENTS_STREAM, name) for name in listened), *((own(TASKS_STREAM), lane) for lane in LANES)]:
            findings += await _served(connection, stream, consumer)
        findings += await _old_listeners(settings, connection)
        for stream in (EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM)):
            findings += _letters(stream, await connection.stream_use(stream))
        for config in (DEAD_LETTERS, *task_streams(settings)):
            findings += _drift(config, settings, await connection.stream_config(str(config.name)))
        findings += _event_size(settings, await connection.stream_config(EVENTS_STREAM))
        return findings
    finally:
        await connection.close()


def _fullness(stream: str, use: StreamUse | None) -> Finding:
    if use is None:
        return Finding(f"stream {stream}", "error", "it does not exist: start `etl up` or `etl listen` and `etl worker` once")
    says = f"{use.messages:,} messages, {use.share:.0%} full"
    if use.has_one_copy:
        remedy = f"`nats stream edit {stream} --replicas 3`, and ETL_NATS_REPLICAS=3 for the streams to come"
        return Finding(f"stream {stream}", "warning", f"{says}, on one node of the cluster only, whose loss stops everything: {remedy}")
    is_full = use.share >= NEARLY_FULL
    return Finding(f"stream {stream}", "warning" if is_full else "ok", f"{says}: raise its limits" if is_full else says)


def _letters(stream: str, use: StreamUse | None) -> list[Finding]:
    if use is None or not use.messages:
        return []
    says = f"{use.messages:,} in {stream}, {use.share:.0%} full"
    if use.share >= _REFUSES:
        return [Finding("dead letters", "error", f"{says}: what belongs there waits in its stream; {LETTERS_FULL_REMEDY}")]
    if use.share >= NEARLY_FULL:
        return [Finding("dead letters", "warning", f"{says}, then what belongs there waits in its stream: {LETTERS_FULL_REMEDY}")]
    return [Finding("dead letters", "warning", f"{says}: look at them with `etl dlq list`")]


def _drift(ours: StreamConfig, settings: BridgeSettings, stored: Mapping[str, Any] | None) -> list[Finding]:
    """与我们建它时不一样的；对错攸关的那些，监听器与工人启动时会改回来，别的照运维的。"""
    if stored is None:
        return []
    wanted = {name: value for name, value in ours.as_dict().items() if name in _LIMITS} | {"num_replicas": settings.nats_replicas}
    wanted["duplicate_window"] = max(stored["duplicate_window"], int(ours.duplicate_window * 1e9))  # 更长的没有害处
    differing = [
        f"{name} is {_readable(name, stored.get(name))}, we create it with {_readable(name, value)}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    says = f"{'; '.join(differing)}: sizes and replicas stay as they are, starting `etl listen` and `etl worker` sets the rest right"
    return [Finding(f"limits of {ours.name}", "warning", says)] if differing else []


def _event_size(settings: BridgeSettings, stored: Mapping[str, Any] | None) -> list[Finding]:
    limit = stored["max_msg_size"] if stored else -1
    if not 0 < limit < settings.event_max_bytes:
        return []
    wanted = f"ETL_EVENT_MAX_BYTES allows {settings.event_max_bytes}"
    says = f"max_msg_size is {limit}, {wanted}: larger events are refused, `nats stream edit {EVENTS_STREAM}`"
    return [Finding(f"limits of {EVENTS_STREAM}", "warning", says)]


async def _served(connection: JetStreamConnection, stream: str, consumer: str) -> list[Finding]:
    """有人等着取，或取走了还没做完：就是有进程在。"""
    info = await connection.consumer_info(stream, consumer)
    if info is None:
        return [Finding(f"{stream}.{consumer}", "warning", "nobody has ever listened: start `etl listen` and `etl worker`")]
    limit = info.config.max_ack_pending or 0
    if 0 < limit * NEARLY_FULL < (info.num_ack_pending or 0):
        says = f"{info.num_ack_pending:,} messages are not acknowledged, at {limit:,} nothing more is handed out: the log says why"
        return [Finding(f"{stream}.{consumer}", "warning", says)]
    if info.num_waiting or info.num_ack_pending:
        return []
    return [Finding(f"{stream}.{consumer}", "warning", f"nobody takes its {info.num_pending or 0:,} waiting messages: is the process up?")]


def _readable(limit: str, value: object) -> object:
    """枚举说它的值，纳秒说时长。"""
    if isinstance(value, Enum):
        return value.value
    if limit in ("max_age", "duplicate_window") and isinstance(value, int):
        return timedelta(microseconds=value // 1000) if value else "unlimited"
    return value


async def _old_listeners(settings: BridgeSettings, connection: JetStreamConnection) -> list[Finding]:
    """0.1.x 的消费者还在：还有它们的监听器，或者刚刚都走了。"""
    old = settings.own_name(CONSUMER)
    info = await connection.consumer_info(EVENTS_STREAM, old)
    if info is None:
        return []
    if info.num_waiting:
        says = "a listener of version 0.1 is up; beside one of this version every event is handled twice, harmlessly: replace it"
    elif info.config.inactive_threshold:
        says = "left by version 0.1: NATS removes it after a day without such a listener, nothing is to be done"
    else:
        says = f"left by version 0.1: it goes once `etl listen` is started again, or with `nats consumer rm {EVENTS_STREAM} {old}`"
    return [Finding(f"{EVENTS_STREAM}.{old}", "warning", says)]


def _newest_event(engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings) -> Iterator[Finding]:
    """监听器已确认的最新一个导入事件，台账该知道。"""
    handled = asyncio.run(_newest_handled(bridge_settings))
    if handled is None:
        return
    sequence, event = handled
    with engine.connect() as connection:
        if not health.lacks_event(connection, settings, import_id=event.import_id, event_id=event.event_id, sequence=sequence):
            return
        newest = health.newest_handled_sequence(connection, settings)
    remedy = f"was a backup restored? `etl replay --seq {newest + 1}`"
    says = f"the event {sequence} of import {event.import_id} was handled, but the ledger knows only events up to {newest}: {remedy}"
    yield Finding("newest event", "error", says)


async def _newest_handled(settings: BridgeSettings) -> tuple[int, DataImportCompleted] | None:
    """流里最新的导入事件，监听器已确认它；没有、是毒的、什么也不要求的、还没轮到的是 None。"""
    connection = JetStreamConnection(settings, name="doctor")
    await connection.open()
    try:
        last = await connection.last_message(EVENTS_STREAM, DATA_IMPORT_COMPLETED)
        handled = await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED)
    finally:
        await connection.close()
    if last is None or last.sequence > handled:
        return None
    try:
        event = DataImportCompleted.model_validate_json(last.data)
    except ValueError:
        return None
    return (last.sequence, event) if event.status in IMPORT_STATUSES else None
