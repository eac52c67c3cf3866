"""@event_task_handler：声明附在处理器上，不合约定的事件各有一句话的理由。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import pytest

from bridge.errors import InvalidEventError
from bridge.events.envelope import DataImportCompleted, EtlCompleted, Event
from bridge.events.event_task_utils import Decision, Done, ReceivedEvent, event_task_handler
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED

IMPORT_ID = "4ff1ed26-34ee-4a3a-a9bb-5a9ef2a3c1d6"


@event_task_handler(
    subject=DATA_IMPORT_COMPLETED,
    event_type=DataImportCompleted,
    supported_version="1.0",
    required_fields=("import_id",),
    task_name="materialize",
)
async def on_import(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
    return [Done()] * len(events)


@event_task_handler(
    subject=ORDERS_ETL_COMPLETED, event_type=EtlCompleted, required_fields=("partitions",), task_name="materialize"
)
async def on_orders(events: Sequence[ReceivedEvent[EtlCompleted]]) -> Sequence[Decision]:
    return [Done(ring=False)] * len(events)


def event(**changes: Any) -> bytes:
    content = {
        "event_id": "0d9cfa7e-9f10-4b5a-9d4e-0d6d3f3f8a11",
        "event_version": "1.0",
        "occurred_at": "2026-01-05T10:00:00+08:00",
        "status": "completed",
        "import_id": IMPORT_ID,
    } | changes
    return json.dumps({name: value for name, value in content.items() if value != "absent"}).encode()


def test_the_declaration_travels_with_the_handler() -> None:
    assert (on_import.subject, on_import.supported_version, on_import.required_fields, on_import.task_name) == (
        DATA_IMPORT_COMPLETED,
        "1.0",
        ("import_id",),
        "materialize",
    )
    assert on_import.event_type is DataImportCompleted
    assert on_orders.event_type is EtlCompleted


async def test_the_handler_gets_typed_events_and_answers_one_decision_each() -> None:
    received = ReceivedEvent(on_import.parse(event()), DATA_IMPORT_COMPLETED, 7, datetime.now(UTC), 1)
    assert await on_import([received, received]) == [Done(ring=True), Done(ring=True)]
    assert received.event.import_id == UUID(IMPORT_ID)
    assert received.event.occurred_at == datetime(2026, 1, 5, 2, tzinfo=UTC)


def test_unknown_fields_are_kept() -> None:
    parsed = on_import.parse(event(shop="旗舰店", nested={"a": [1]}))
    assert parsed.model_extra == {"shop": "旗舰店", "nested": {"a": [1]}}


def test_completion_of_another_etl_needs_only_its_days() -> None:
    parsed = on_orders.parse(
        event(status="success", run_id="r1", partitions=["2026-01-05", "2026-01-06"], duration_seconds=3)
    )
    assert parsed.partitions == (date(2026, 1, 5), date(2026, 1, 6))
    assert (parsed.duration_seconds, parsed.downstream) == (3.0, "pending")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "a JSON list instead of an object"),
        (b'"text"', "a JSON str instead of an object"),
        (b"null", "a JSON NoneType instead of an object"),
        (event(event_version="2.0"), "event_version is '2.0', supported is '1.0'"),
        (event(event_version=1.0), "event_version is 1.0, supported is '1.0'"),
        (event(event_version="absent"), "event_version is None, supported is '1.0'"),
        (event(event_id="absent"), "field event_id is missing"),
        (event(occurred_at="absent"), "field occurred_at is missing"),
        (event(status="absent"), "field status is missing"),
        (event(import_id="absent"), "field import_id is missing"),
        (event(import_id=None), "field import_id is missing"),
        (event(import_id="not-a-uuid"), "field import_id: Input should be a valid UUID"),
        (event(import_id=7), "field import_id: "),
        (event(event_id="7"), "field event_id: "),
        (event(status=1), "field status: Input should be a valid string"),
        (event(occurred_at=1_767_600_000), "field occurred_at: "),
        (event(occurred_at="2026-01-05T10:00:00"), "field occurred_at: Input should have timezone info"),
        (event(occurred_at="yesterday"), "field occurred_at: "),
    ],
)
def test_unusable_event_is_rejected_with_one_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidEventError) as raised:
        on_import.parse(data)
    assert raised.value.reason.startswith(reason)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"partitions": ["2026-13-01"]}, "field partitions.0: "),
        ({"partitions": "2026-01-05"}, "field partitions: "),
        ({"partitions": ["2026-01-05"], "status": "maybe"}, "field status: "),
        ({"partitions": ["2026-01-05"], "error_count": "3"}, "field error_count: "),
        ({"partitions": ["2026-01-05"], "downstream": "later"}, "field downstream: "),
    ],
)
def test_wrong_type_in_a_completion_names_the_field(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidEventError) as raised:
        on_orders.parse(event(**({"status": "success", "run_id": "r1"} | changes)))
    assert raised.value.reason.startswith(reason)


def test_subject_without_a_type_of_its_own_is_checked_for_the_envelope() -> None:
    @event_task_handler(subject="events.other", event_type=Event, task_name="other")
    async def on_other(events: Sequence[ReceivedEvent[Event]]) -> Sequence[Decision]:
        return [Done()] * len(events)

    assert on_other.parse(event(import_id=7)).model_extra == {"import_id": 7}
