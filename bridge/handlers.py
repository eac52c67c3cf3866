"""事件处理器：校验过的事件 → 台账。声明与校验见 events/event_task_utils.py。"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bridge.events.envelope import IMPORT_STATUSES, DataImportCompleted, EtlCompleted
from bridge.events.event_task_utils import Decision, Done, Ignored, ReceivedEvent, event_task_handler
from bridge.events.subjects import CUSTOMERS_ETL_COMPLETED, DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.task_names import MATERIALIZE_DUE
from etl_assets.core.business_day import partition_range
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import get_settings
from etl_assets.services.intake import ImportEvent, Outcome, request_imports
from etl_assets.services.ledger import request_downstream
from etl_assets.services.outbox import installation_id


@event_task_handler(subject=DATA_IMPORT_COMPLETED, supported_version="1.0", required_fields=("import_id",), task_name=MATERIALIZE_DUE)
async def on_data_import_completed(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
    """导入完成或撤回：要求受影响的日子。"""
    relevant = [received for received in events if received.event.status in IMPORT_STATUSES]
    outcomes = iter(await asyncio.to_thread(_request_imports, relevant) if relevant else [])
    return [
        _decide(received.event, next(outcomes))
        if received.event.status in IMPORT_STATUSES
        else Ignored(f"status {received.event.status!r} asks for nothing")
        for received in events
    ]


@event_task_handler(subject=ORDERS_ETL_COMPLETED, supported_version="1.0", required_fields=("partitions",), task_name=MATERIALIZE_DUE)
async def on_orders_etl_completed(events: Sequence[ReceivedEvent[EtlCompleted]]) -> Sequence[Decision]:
    """别处的 ETL 做完了订单：客户到期。"""
    return await asyncio.to_thread(_request_downstream, "orders", events)


@event_task_handler(subject=CUSTOMERS_ETL_COMPLETED, supported_version="1.0", required_fields=("partitions",), task_name=MATERIALIZE_DUE)
async def on_customers_etl_completed(events: Sequence[ReceivedEvent[EtlCompleted]]) -> Sequence[Decision]:
    """别处的 ETL 做完了客户：商机到期。"""
    return await asyncio.to_thread(_request_downstream, "customers", events)


HANDLERS = (on_data_import_completed, on_orders_etl_completed, on_customers_etl_completed)


def _request_imports(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> list[Outcome]:
    with translated_errors():
        return request_imports(get_engine(), get_settings(), [import_event(received) for received in events])


def import_event(received: ReceivedEvent[DataImportCompleted]) -> ImportEvent:
    """台账要知道的：哪次导入、哪个事件、在流里的哪里。"""
    return ImportEvent(
        import_id=received.event.import_id,
        event_id=received.event.event_id,
        allow_deletes=(received.event.model_extra or {}).get("allow_deletes") is True,
        sequence=received.sequence,
        stored_at=received.published_at,
    )


def _decide(event: DataImportCompleted, outcome: Outcome) -> Decision:
    match outcome:
        case "requested" | "known":
            return Done()
        case "irrelevant":
            return Ignored(f"withdrawn import {event.import_id} never reached the tables")
        case "pending" | "missing":
            # 台账记着它，对账者等它的导入：流里不必等，也就挡不住别的事件
            return Done(ring=False)


def _request_downstream(asset: str, events: Sequence[ReceivedEvent[EtlCompleted]]) -> list[Decision]:
    settings = get_settings()
    partitions = partition_range(settings)
    with translated_errors(), get_engine().begin() as connection:
        own = str(installation_id(connection))
        usable = [received.event for received in events if concerns(received.event, own, settings.target_schema)]
        days = {day for event in usable for day in event.partitions if partitions.first <= day <= partitions.last}
        request_downstream(connection, settings.target_schema, asset, days)
    return [Done(ring=received.event in usable) for received in events]


def concerns(event: EtlCompleted, own_installation: str, target: str) -> bool:
    """自己发的不算，写到别的 schema 去的（另一套安装的影子）不算；没有 target 的是旧系统的。"""
    extra = event.model_extra or {}
    return event.status != "failed" and extra.get("installation") != own_installation and extra.get("target", target) == target
