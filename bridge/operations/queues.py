"""NATS 一侧：`etl status` 列的深度，`etl doctor` 看的服务器、流、消费者、死信，与台账对不对得上。"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, NamedTuple

import sqlalchemy as sa
from nats.js.api import ConsumerInfo, StreamConfig

from bridge.events.adopted_stream import shortcomings
from bridge.events.envelope import IMPORT_STATUSES, DataImportCompleted
from bridge.events.handled_events import handled_up_to
from bridge.events.streams import CONSUMER, DEAD_LETTERS, consumer_names
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY
from bridge.jetstream.stored_messages import last_message
from bridge.jetstream.streams import (
    NEARLY_FULL,
    StreamUse,
    consumer_info,
    stream_config,
    stream_consumers,
    stream_use,
)
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM, TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.operations.durability import look_at_durability
from bridge.operations.findings import Finding
from bridge.queue.streams import task_streams
from bridge.settings import LANES, BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.reports import health

_REFUSES = 0.98
_LOOKS = 4
_LOOK_AGAIN_SECONDS = 0.3
_FIGURES = ("waiting", "in_progress", "full", "takers", "last_taken_at")
_LIMITS = (
    "max_bytes",
    "max_msgs",
    "max_age",
    "max_msg_size",
    "max_msgs_per_subject",
    "discard",
    "retention",
    "duplicate_window",
)


async def read_queue_depths(settings: BridgeSettings) -> list[dict[str, Any]]:
    """一行一个队列：waiting 等着的，in_progress 已取走未确认的，takers 几个进程此刻等着取，last_taken_at 最近一次取走。

    流只有占了上限的百分之几 full，死信也有 waiting；没有的是 None。
    """
    own = settings.own_name
    async with JetStreamConnection(settings, name="status") as connection:
        watched = await _watch(connection, await _queues(connection))
        depths = [_consumer_depth(queue, info) for queue, info in watched.seen.items()]
        letters = {EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM)}
        streams = (EVENTS_STREAM, own(TASKS_STREAM), EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM))
        return depths + [await _stream_depth(connection, stream, waits=stream in letters) for stream in streams]


async def _queues(connection: JetStreamConnection) -> list[tuple[str, str]]:
    """这套安装的每个队列：流与消费者。"""
    own = connection.settings.own_name
    listened = await consumer_names(connection.settings, connection) or [own(CONSUMER)]
    return [*((EVENTS_STREAM, name) for name in listened), *((own(TASKS_STREAM), lane) for lane in LANES)]


def _consumer_depth(queue: tuple[str, str], info: ConsumerInfo | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_FIGURES)
    if info is not None:
        row |= {"waiting": info.num_pending, "in_progress": info.num_ack_pending, "takers": info.num_waiting or 0}
        row["last_taken_at"] = info.delivered.last_active if info.delivered else None
    return {"queue": ".".join(queue), **row}


async def read_queue_states(connection: JetStreamConnection) -> dict[str, ConsumerInfo]:
    """每个已有的队列（流.消费者）此刻的消费者。"""
    infos = {queue: await consumer_info(connection, *queue) for queue in await _queues(connection)}
    return {".".join(queue): info for queue, info in infos.items() if info is not None}


async def _stream_depth(connection: JetStreamConnection, stream: str, *, waits: bool) -> dict[str, Any]:
    """:param waits: 里面的都等着人看：死信。EVENTS 里处理过的也还在。"""
    use = await stream_use(connection, stream)
    row = dict.fromkeys(_FIGURES) | ({"full": round(use.share * 100)} if use else {})
    return {"queue": stream, **row, **({"waiting": use.messages} if use and waits else {})}


async def look_at_server(settings: BridgeSettings) -> list[Finding]:
    async with JetStreamConnection(settings, name="doctor") as connection:
        found = Finding("nats", "ok", f"version {connection.client.connected_server_version}, JetStream")
        return [found, await asyncio.to_thread(look_at_durability, connection)]


async def look_at_queues(settings: BridgeSettings) -> list[Finding]:
    own = settings.own_name
    async with JetStreamConnection(settings, name="doctor") as connection:
        findings = [
            _fullness(stream, await stream_use(connection, stream)) for stream in (EVENTS_STREAM, own(TASKS_STREAM))
        ]
        findings += await _processes(connection)
        findings += await _old_listeners(settings, connection)
        for stream in (EVENTS_DLQ_STREAM, own(TASKS_DLQ_STREAM)):
            findings += _letters(stream, await stream_use(connection, stream))
        for config in (DEAD_LETTERS, *task_streams(settings)):
            findings += _drift(config, settings, await stream_config(connection, str(config.name)))
        events = await stream_config(connection, EVENTS_STREAM)
        findings += _event_size(settings, events)
        findings += _promise(events, await stream_consumers(connection, EVENTS_STREAM))
        return findings


def _fullness(stream: str, use: StreamUse | None) -> Finding:
    if use is None:
        return Finding(
            f"stream {stream}",
            "error",
            "it does not exist: start `etl up` or `etl listen` and `etl worker` once",
            fix="streams",
        )
    says = f"{use.messages:,} messages, {use.share:.0%} full"
    if use.has_one_copy:
        remedy = f"`nats stream edit {stream} --replicas 3`, and ETL_NATS_REPLICAS=3 for the streams to come"
        return Finding(
            f"stream {stream}",
            "warning",
            f"{says}, on one node of the cluster only, whose loss stops everything: {remedy}",
        )
    is_full = use.share >= NEARLY_FULL
    return Finding(f"stream {stream}", "warning" if is_full else "ok", f"{says}: raise its limits" if is_full else says)


def _letters(stream: str, use: StreamUse | None) -> list[Finding]:
    if use is None or not use.messages:
        return []
    says = f"{use.messages:,} in {stream}, {use.share:.0%} full"
    if use.share >= _REFUSES:
        return [
            Finding("dead letters", "error", f"{says}: what belongs there waits in its stream; {LETTERS_FULL_REMEDY}")
        ]
    if use.share >= NEARLY_FULL:
        return [
            Finding(
                "dead letters", "warning", f"{says}, then what belongs there waits in its stream: {LETTERS_FULL_REMEDY}"
            )
        ]
    return [Finding("dead letters", "warning", f"{says}: look at them with `etl dlq list`")]


def _drift(ours: StreamConfig, settings: BridgeSettings, stored: Mapping[str, Any] | None) -> list[Finding]:
    """与我们建它时不一样的；对错攸关的那些，监听器与工人启动时会改回来，别的照运维的。"""
    if stored is None:
        return []
    wanted = {name: value for name, value in ours.as_dict().items() if name in _LIMITS} | {
        "num_replicas": settings.nats_replicas
    }
    wanted["duplicate_window"] = max(stored["duplicate_window"], int(ours.duplicate_window * 1e9))  # 更长的没有害处
    differing = [
        f"{name} is {_readable(name, stored.get(name))}, we create it with {_readable(name, value)}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    says = f"{'; '.join(differing)}: sizes and replicas stay as they are, starting `etl listen` and `etl worker` sets the rest right"
    return [Finding(f"limits of {ours.name}", "warning", says, fix="streams")] if differing else []


def _event_size(settings: BridgeSettings, stored: Mapping[str, Any] | None) -> list[Finding]:
    limit = stored["max_msg_size"] if stored else -1
    if not 0 < limit < settings.event_max_bytes:
        return []
    wanted = f"ETL_EVENT_MAX_BYTES allows {settings.event_max_bytes}"
    says = f"max_msg_size is {limit}, {wanted}: larger events are refused, `nats stream edit {EVENTS_STREAM}`"
    return [Finding(f"limits of {EVENTS_STREAM}", "warning", says)]


def _promise(stored: Mapping[str, Any] | None, consumers: Sequence[str]) -> list[Finding]:
    """EVENTS 守不守得住；监听器起来时拒绝或者说一声的，也是这些。"""
    return [
        Finding(
            f"promise of {EVENTS_STREAM}",
            "error" if found.is_refused else "warning",
            f"{found.problem}: {found.remedy}",
        )
        for found in shortcomings(stored or {}, subjects=len(consumers))
    ]


class _Watched(NamedTuple):
    """看了几眼：每个队列的消费者，等着取的人最多的那一眼；有人取的是哪些。"""

    seen: dict[tuple[str, str], ConsumerInfo | None]
    taken: set[tuple[str, str]]


async def _watch(connection: JetStreamConnection, queues: Sequence[tuple[str, str]]) -> _Watched:
    """有人等着取，或取走了还没做完：就是有进程在。两次取之间的一瞬没有人等，所以看几眼。"""
    seen: dict[tuple[str, str], ConsumerInfo | None] = {}
    taken: set[tuple[str, str]] = set()
    for _ in range(_LOOKS):
        for queue in queues:
            info, before = await consumer_info(connection, *queue), seen.get(queue)
            if before is None or (info is not None and (info.num_waiting or 0) >= (before.num_waiting or 0)):
                seen[queue] = info
            if info is not None and (info.num_waiting or info.num_ack_pending):
                taken.add(queue)
        if len(taken) == len(queues):
            break
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    return _Watched(seen, taken)


async def _processes(connection: JetStreamConnection) -> list[Finding]:
    queues = await _queues(connection)
    seen, taken = await _watch(connection, queues)
    findings = []
    for what, start, is_its in (("listener", "etl listen", True), ("worker", "etl worker", False)):
        own = [queue for queue in queues if (queue[0] == EVENTS_STREAM) is is_its]
        if taken.isdisjoint(own):
            waiting = sum((info.num_pending or 0) for queue in own if (info := seen[queue]) is not None)
            says = f"no {what} is running, {waiting:,} messages wait for it: start `{start}` (`etl up` starts it, too)"
            findings.append(Finding(f"{what}s", "error", says))
        else:
            findings.append(Finding(f"{what}s", "ok", "running"))
            findings += [found for queue in own if queue not in taken for found in _untaken(queue, seen[queue])]
    return findings + [found for queue, info in seen.items() if info is not None for found in _stuck(queue, info)]


def _untaken(queue: tuple[str, str], info: ConsumerInfo | None) -> list[Finding]:
    """忙着的工人不取别的车道：此刻没有人取的，有活等着才说。"""
    if info is None:
        return [
            Finding(
                ".".join(queue), "warning", "nobody has ever taken from it: start one that does (`etl worker --lanes`)"
            )
        ]
    if not info.num_pending:
        return []
    says = f"nobody takes its {info.num_pending:,} waiting messages now: are all workers busy, or does none serve it (`--lanes`)?"
    return [Finding(".".join(queue), "warning", says)]


def _stuck(queue: tuple[str, str], info: ConsumerInfo) -> list[Finding]:
    limit = info.config.max_ack_pending or 0
    if not 0 < limit * NEARLY_FULL < (info.num_ack_pending or 0):
        return []
    says = f"{info.num_ack_pending:,} messages are not acknowledged, at {limit:,} nothing more is handed out: the log says why"
    return [Finding(".".join(queue), "warning", says)]


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
    info = await consumer_info(connection, EVENTS_STREAM, old)
    if info is None:
        return []
    if info.num_waiting:
        says = "a listener of version 0.1 is up; beside one of this version every event is handled twice, harmlessly: replace it"
    elif info.config.inactive_threshold:
        says = "left by version 0.1: NATS removes it after a day without such a listener, nothing is to be done"
    else:
        says = f"left by version 0.1: it goes once `etl listen` is started again, or with `nats consumer rm {EVENTS_STREAM} {old}`"
    return [Finding(f"{EVENTS_STREAM}.{old}", "warning", says)]


def look_at_newest_event(
    engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings
) -> Iterator[Finding]:
    """监听器已确认的最新一个导入事件，台账该知道。"""
    handled = asyncio.run(_newest_handled(bridge_settings))
    if handled is None:
        return
    sequence, event = handled
    with engine.connect() as connection:
        if not health.lacks_event(
            connection, settings, import_id=event.import_id, event_id=event.event_id, sequence=sequence
        ):
            return
        newest = health.newest_handled_sequence(connection, settings)
    remedy = f"was a backup restored? `etl replay --seq {newest + 1}`"
    says = f"the event {sequence} of import {event.import_id} was handled, but the ledger knows only events up to {newest}: {remedy}"
    yield Finding("newest event", "error", says)


async def _newest_handled(settings: BridgeSettings) -> tuple[int, DataImportCompleted] | None:
    """流里最新的导入事件，监听器已确认它；没有、是毒的、什么也不要求的、还没轮到的是 None。"""
    async with JetStreamConnection(settings, name="doctor") as connection:
        last = await last_message(connection, EVENTS_STREAM, DATA_IMPORT_COMPLETED)
        handled = await handled_up_to(connection, settings, DATA_IMPORT_COMPLETED)
    if last is None or last.sequence > handled:
        return None
    try:
        event = DataImportCompleted.model_validate_json(last.data)
    except ValueError:
        return None
    return (last.sequence, event) if event.status in IMPORT_STATUSES else None
