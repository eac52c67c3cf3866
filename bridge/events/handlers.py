"""事件处理器：校验过的事件 → 台账。声明与校验见 events/event_task_utils.py。"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import compress
from typing import Any

from bridge.errors import tolerate
from bridge.events.asset_events import events_by_subject
from bridge.events.envelope import IMPORT_STATUSES, DataImportCompleted, EtlCompleted
from bridge.events.event_task_utils import Decision, Done, EventTaskHandler, Ignored, ReceivedEvent, event_task_handler
from bridge.events.subjects import DATA_IMPORT_COMPLETED, etl_completed
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.side_tasks import pause
from etl_assets.core.asset_events import AnyEvent, Asked, AssetEvent
from etl_assets.core.business_day import partition_range
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import get_settings
from etl_assets.intake.imports import ImportEvent, Outcome, request_imports
from etl_assets.ledger.graph import AssetGraph, read_graph
from etl_assets.ledger.outbox import installation_id
from etl_assets.ledger.requests import request_downstream

logger = get_logger(__name__)

_LOOK_SECONDS = 1.0
_SHOWN_IDS = 5

_cannot_read_graph = RepeatedWarning(logger, "cannot listen yet")


@event_task_handler(
    subject=DATA_IMPORT_COMPLETED,
    event_type=DataImportCompleted,
    required_fields=("import_id",),
    task_name=MATERIALIZE_DUE,
)
async def on_data_import_completed(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
    """导入完成或撤回：要求受影响的日子。"""
    asked = [import_event(received) for received in events]
    outcomes = await asyncio.to_thread(request_imports, get_engine(), get_settings(), asked)
    return [_decide(received.event, outcome) for received, outcome in zip(events, outcomes, strict=True)]


def on_etl_completed(asset: str) -> EventTaskHandler[EtlCompleted]:
    """别处的 ETL 做完了 asset：紧跟在它后面的到期。"""

    @event_task_handler(
        subject=etl_completed(asset),
        event_type=EtlCompleted,
        required_fields=("partitions",),
        task_name=MATERIALIZE_DUE,
    )
    async def request(events: Sequence[ReceivedEvent[EtlCompleted]]) -> Sequence[Decision]:
        return await asyncio.to_thread(_request_downstream, asset, events)

    return request


def on_asset_event(subject: str, of_asset: AssetEvent[AnyEvent]) -> EventTaskHandler[AnyEvent]:
    """资产自己认得的事件：要求什么，由它说。"""

    @event_task_handler(subject=subject, event_type=of_asset.event_type, task_name=MATERIALIZE_DUE)
    async def request(events: Sequence[ReceivedEvent[AnyEvent]]) -> Sequence[Decision]:
        return await asyncio.to_thread(_handle, of_asset, events)

    return request


HANDLERS = (on_data_import_completed,)
"""不论有哪些资产。"""


def handlers_of(graph: AssetGraph) -> tuple[EventTaskHandler[Any], ...]:
    """HANDLERS，每个后面还有资产的资产的，与各资产自己的。"""
    followed = [name for name in graph.names if graph.downstreams(name)]
    own = [on_asset_event(subject, event) for name in graph.names for subject, event in events_by_subject(name).items()]
    return (*HANDLERS, *map(on_etl_completed, followed), *own)


async def handlers_once_known(stop: asyncio.Event) -> Sequence[EventTaskHandler[Any]]:
    """`handlers_of` 这套安装的图；还没有工人写下它、数据库不在就等。要停下了，就没有。"""
    while not stop.is_set():
        try:
            return handlers_of(await asyncio.to_thread(read_own_graph))
        except Exception as error:  # noqa: BLE001  # 不是数据库不在、不让做的，原样抛出
            tolerate(error, _cannot_read_graph)
        await pause(_LOOK_SECONDS, stop)
    return ()


def read_own_graph() -> AssetGraph:
    """这套安装的图。"""
    return transact(get_engine(), read_graph, get_settings().target_schema)


def import_event(received: ReceivedEvent[DataImportCompleted]) -> ImportEvent:
    """台账要知道的：哪次导入、哪个事件、在流里的哪里。"""
    return ImportEvent(
        import_id=received.event.import_id,
        event_id=received.event.event_id,
        asks=received.event.status in IMPORT_STATUSES,
        allow_deletes=received.event.allow_deletes is True,
        sequence=received.sequence,
        stored_at=received.published_at,
    )


def _decide(event: DataImportCompleted, outcome: Outcome) -> Decision:
    match outcome:
        case "requested" | "known":
            return Done()
        case "irrelevant":
            return Ignored(f"withdrawn import {event.import_id} never reached the tables")
        case "asks for nothing":
            return Ignored(f"status {event.status!r} asks for nothing")
        case "pending" | "missing":
            # 台账记着它，对账者等它的导入：流里不必等，也就挡不住别的事件
            return Done(ring=False)


def _request_downstream(asset: str, events: Sequence[ReceivedEvent[EtlCompleted]]) -> list[Decision]:
    settings = get_settings()
    partitions = partition_range(settings)
    with translated_errors(), get_engine().begin() as connection:
        own = str(installation_id(connection))
        is_usable = [concerns(received.event, own, settings.target_schema) for received in events]
        done = {day for received in compress(events, is_usable) for day in received.event.partitions}
        days = {day for day in done if partitions.first <= day <= partitions.last}
        # 一批的日子一次要求：逐个事件要求，锁台账的行就没有固定的次序，几个监听器会互相锁死
        request_downstream(connection, settings.target_schema, asset, days)
    return [Done(ring=usable) for usable in is_usable]


def _handle(of_asset: AssetEvent[AnyEvent], events: Sequence[ReceivedEvent[AnyEvent]]) -> list[Decision]:
    with translated_errors(), get_engine().begin() as connection:
        asked = of_asset.handle(connection, get_settings(), [received.event for received in events])
    return [_decide_asked(received, each) for received, each in zip(events, asked, strict=True)]


def _decide_asked(received: ReceivedEvent[Any], asked: Asked) -> Decision:
    shown = asked.unknown[:_SHOWN_IDS]
    if not asked.days:
        return Ignored(f"none of what it names is here: {', '.join(shown)}")
    if shown:
        unknown = len(asked.unknown)
        logger.info(
            "event names what is not here",
            subject=received.subject,
            stream_sequence=received.sequence,
            unknown=unknown,
            first=shown,
        )
    return Done()


def concerns(event: EtlCompleted, own_installation: str, target: str) -> bool:
    """自己发的不算，写到别的 schema 去的（另一套安装的影子）不算；没有 target 的是旧系统的。"""
    return event.status != "failed" and event.installation != own_installation and event.target in (None, target)
