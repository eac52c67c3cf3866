"""最后的核对：什么都做完了没有，什么都没丢没有。"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date
from typing import Any
from uuid import UUID

import nats.errors
import nats.js.errors
import sqlalchemy as sa
from dagster import AssetKey, EventLogEntry
from dagster._serdes import deserialize_value
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.demo.reference import find_differences
from bridge.errors import BridgeError
from bridge.events.streams import consumer_names
from bridge.events.subjects import DATA_IMPORT_COMPLETED, etl_completed
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import DeadLetterHeader
from bridge.jetstream.streams import consumer_info
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM, TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import DAGSTER_SCHEMA
from etl_assets.core.etl_tables import import_events, leases, ledger, outbox, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, target_tables
from etl_assets.orders.recount import find_wrong_days
from tests.chaos.floods import GARBAGE_MARK, Floods

_FINAL = ("SUCCESS", "FAILURE", "CANCELED")
_RUNS = sa.table("runs", sa.column("run_id"), sa.column("status"), schema=DAGSTER_SCHEMA)
_EVENTS = sa.table("event_logs", *map(sa.column, ("run_id", "asset_key", "dagster_event_type")), schema=DAGSTER_SCHEMA)
_DUE = ledger.c.requested > ledger.c.materialized
_POLL_SECONDS = 0.5
_SAY_SECONDS = 5.0
_NO_IMPORT = "is not in import_tasks"
_NUMBERS = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]+")


@dataclass(frozen=True)
class StoredEvent:
    """流里的一个事件。"""

    subject: str
    sequence: int
    content: dict[str, Any]


@asynccontextmanager
async def jetstream(settings: BridgeSettings) -> AsyncIterator[JetStreamConnection]:
    connection = JetStreamConnection(settings, name="verdict")
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


def say(text: str) -> None:
    """马上看得见，不等测试完。"""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


# ---- 做完了没有 ------------------------------------------------------------------


async def wait_until_drained(
    engine: sa.Engine, settings: BridgeSettings, *, since: float, limit_seconds: float
) -> float:
    """等到没有剩下的；返回从 since（单调时钟）起用了多久，到时还没完就说剩下什么。"""
    left: list[str] = ["nothing was looked at"]
    said = 0.0
    while time.monotonic() < since + limit_seconds:
        try:
            left = [*left_in_database(engine), *await left_in_queues(settings)]
        except (sa.exc.DBAPIError, BridgeError, nats.errors.Error, nats.js.errors.Error) as error:
            left = [f"cannot look: {error}"]
        seconds = time.monotonic() - since
        if not left:
            return seconds
        if seconds > said + _SAY_SECONDS:
            say(f"{seconds:.0f} s after the last kill: {'; '.join(left)}")
            said = seconds
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"not drained {limit_seconds:.0f} s after the last kill: {'; '.join(left)}")


def left_in_database(engine: sa.Engine) -> list[str]:
    """到期的日子（搁置的不算，另外核对）、租约、发件箱、没有结局的运行。"""
    counted = {
        "days due": sa.select(sa.func.count()).where(_DUE, ledger.c.held_reason.is_(None)),
        "leases": sa.select(sa.func.count()).select_from(leases),
        "events that wait for their import": sa.select(sa.func.count()).select_from(waiting_events),
        "events in the outbox": sa.select(sa.func.count()).select_from(outbox),
        "runs without an end": sa.select(sa.func.count()).where(_RUNS.c.status.not_in(_FINAL)),
    }
    with engine.connect() as connection:
        return [f"{count} {name}" for name, query in counted.items() if (count := connection.scalar(query))]


async def left_in_queues(settings: BridgeSettings) -> list[str]:
    """没有处理完的事件，没有做完的任务。"""
    async with jetstream(settings) as connection:
        names = await consumer_names(settings, connection)
        consumers = [info for name in names if (info := await consumer_info(connection, EVENTS_STREAM, name))]
        tasks = (await connection.context.stream_info(TASKS_STREAM)).state.messages
    events = sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in consumers)
    return [f"{count} {what}" for count, what in ((events, "events not handled"), (tasks, "tasks")) if count]


# ---- 丢了什么没有 ----------------------------------------------------------------


def assert_nothing_is_lost(
    engine: sa.Engine, settings: EtlSettings, events: Sequence[StoredEvent], promised: Iterable[UUID]
) -> None:
    """
    :param promised: 流答应存下了的事件。
    """
    assert held_days(engine) == []
    assert not_stored(promised, events) == []
    assert not_covered(engine, events) == []
    assert not_announced(engine, events) == []
    assert wrong_accounts(engine, settings) == []
    assert find_differences(engine, settings) == []


def held_days(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(ledger.c.asset, ledger.c.day, ledger.c.held_reason).where(_DUE, ledger.c.held_reason.isnot(None))
        )
        return [f"{asset} {day}: {reason}" for asset, day, reason in rows]


def runs_by_status(engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return dict(connection.execute(sa.select(_RUNS.c.status, sa.func.count()).group_by(_RUNS.c.status)).all())


def assets_by_scope(engine: sa.Engine) -> Counter[str]:
    """资产、它做了什么（整天的为什么） → 运行的个数；几十天的运行一天一条，只看一条。"""
    logs = sa.table(
        "event_logs", *map(sa.column, ("run_id", "step_key", "dagster_event_type", "event")), schema=DAGSTER_SCHEMA
    )
    key = (logs.c.run_id, logs.c.step_key)
    materialized = (
        sa.select(logs.c.event)
        .where(logs.c.dagster_event_type == "ASSET_MATERIALIZATION")
        .distinct(*key)
        .order_by(*key)
    )
    counted = Counter[str]()
    with engine.connect() as connection:
        for text in connection.scalars(materialized):
            found = deserialize_value(text, EventLogEntry).asset_materialization
            assert found is not None
            why = found.metadata.get("whole_because")
            counted[
                f"{found.asset_key.to_user_string()} {found.metadata['scope'].value}{f' ({why.value})' if why else ''}"
            ] += 1
    return counted


def wrong_accounts(engine: sa.Engine, settings: EtlSettings) -> list[date]:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as snapshot:
        return find_wrong_days(snapshot, settings)


async def read_events(settings: BridgeSettings) -> list[StoredEvent]:
    """流里的事件；垃圾不算。"""
    async with jetstream(settings) as connection:
        messages = await _read(connection, EVENTS_STREAM)
    sound = [message for message in messages if not message.data.startswith(GARBAGE_MARK)]
    return [
        StoredEvent(message.subject, message.metadata.sequence.stream, json.loads(message.data)) for message in sound
    ]


async def misjudged(settings: BridgeSettings, floods: Floods, good: Iterable[UUID]) -> list[str]:
    """好的导入的死信、缘由不对的死信，以及没有死信的垃圾与永远没有导入的事件。"""
    async with jetstream(settings) as connection:
        letters = await _read(connection, EVENTS_DLQ_STREAM)
    marks, imports = set[str](), dict[UUID, str]()
    for letter in letters:
        if letter.data.startswith(GARBAGE_MARK):
            marks.add(letter.data[len(GARBAGE_MARK) :][:36].decode())
        else:
            imports[UUID(json.loads(letter.data)["import_id"])] = _reason(letter)
    return [
        *[
            f"good import {import_id} was dead-lettered: {imports[import_id]}"
            for import_id in sorted(imports.keys() & set(good))
        ],
        *[f"garbage {mark} has no letter" for mark in sorted(floods.garbage - marks)],
        *[f"the event of import {import_id} has no letter" for import_id in sorted(floods.waiting - imports.keys())],
        *[
            f"import {import_id} never was: {reason}"
            for import_id, reason in imports.items()
            if _NO_IMPORT not in reason
        ],
    ]


def not_stored(promised: Iterable[UUID], events: Iterable[StoredEvent]) -> list[UUID]:
    """流答应存下了而没有的事件。"""
    stored = {UUID(event.content["event_id"]) for event in events if event.subject == DATA_IMPORT_COMPLETED}
    return sorted(set(promised) - stored)


def not_covered(engine: sa.Engine, events: Iterable[StoredEvent]) -> list[str]:
    """流里有它的事件、台账却没有管的导入；从来没有的、从未入表就撤回了的不必管。"""
    named = {
        UUID(event.content["import_id"]): event.sequence for event in events if event.subject == DATA_IMPORT_COMPLETED
    }
    orders = target_tables("public").orders
    with engine.connect() as connection:
        handled = set(connection.scalars(sa.select(import_events.c.import_id)))
        withdrawn = set(
            connection.scalars(sa.select(import_tasks.c.import_id).where(import_tasks.c.status == "failed"))
        )
        loaded = set(connection.scalars(sa.select(orders.c.import_id.distinct())))
        existing = set(connection.scalars(sa.select(import_tasks.c.import_id)))
    return [
        f"event {sequence}, import {import_id}"
        for import_id, sequence in sorted(named.items())
        if import_id in existing
        and import_id not in handled
        and not (import_id in withdrawn and import_id not in loaded)
    ]


def not_announced(engine: sa.Engine, events: Iterable[StoredEvent]) -> list[str]:
    """做成了的运行物化的资产，没有完成事件的。"""
    announced = {(event.content.get("run_id"), event.subject) for event in events}
    materialized = (
        sa.select(_EVENTS.c.run_id, _EVENTS.c.asset_key)
        .join(_RUNS, _RUNS.c.run_id == _EVENTS.c.run_id)
        .where(_RUNS.c.status == "SUCCESS", _EVENTS.c.dagster_event_type == "ASSET_MATERIALIZATION")
    )
    with engine.connect() as connection:
        made = {
            (row.run_id, etl_completed(AssetKey.from_db_string(row.asset_key).to_user_string()))
            for row in connection.execute(materialized)
        }
        runs = set(connection.scalars(sa.select(_RUNS.c.run_id).where(_RUNS.c.status == "SUCCESS")))
    assert {run_id for run_id, _ in made} == runs
    return sorted(f"{subject} of run {run_id}" for run_id, subject in made - announced)


def announced_twice(events: Iterable[StoredEvent]) -> list[str]:
    """一个运行的一个资产的一份，不止一个成功的完成事件。"""
    found = defaultdict[str, list[StoredEvent]](list)
    for event in events:
        if event.content.get("status") == "success" and "run_id" in event.content:
            part = event.content.get("part", 1)
            found[f"{event.subject} of run {event.content['run_id']}, part {part}"].append(event)
    return [
        f"{name}: {[(event.sequence, event.content['event_id']) for event in of_run]}"
        for name, of_run in found.items()
        if len(of_run) > 1
    ]


async def explain_dead_letters(settings: BridgeSettings) -> dict[str, Counter[str]]:
    """每个死信流里，各种缘由的封数。"""
    async with jetstream(settings) as connection:
        letters = {stream: await _read(connection, stream) for stream in (EVENTS_DLQ_STREAM, TASKS_DLQ_STREAM)}
    return {
        stream: Counter(_NUMBERS.sub("…", _reason(letter)) for letter in found) for stream, found in letters.items()
    }


async def purge(settings: BridgeSettings, stream: str) -> None:
    """清空一个流，像手滑的运维那样。

    :raises BridgeError: NATS 正好不在。
    """
    async with jetstream(settings) as connection:
        with suppress(nats.errors.Error, nats.js.errors.Error):
            await connection.context.purge_stream(stream)


async def _read(connection: JetStreamConnection, stream: str) -> list[Msg]:
    """一个流的全部消息，按次序。"""
    state = (await connection.context.stream_info(stream)).state
    config = ConsumerConfig(ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, inactive_threshold=60)
    subscription = await connection.context.pull_subscribe(subject="", stream=stream, config=config)
    messages: list[Msg] = []
    while len(messages) < state.messages:
        messages += await subscription.fetch(500, timeout=10)
    return messages


def _reason(letter: Msg) -> str:
    return str((letter.headers or {}).get(DeadLetterHeader.REASON, "no reason given"))
