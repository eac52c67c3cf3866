"""events.lead.changed：合约定的读成带类型的，不合的各有一句话。"""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError

from bridge.errors import InvalidEventError
from bridge.events.envelope import event_type
from bridge.events.handlers import handlers_of
from bridge.settings import BridgeSettings
from etl_assets.leads.events import MOST_IDS, LeadChanged
from etl_assets.ledger.graph import AssetGraph
from tests.the_three import graph

SUBJECT = "events.lead.changed"
ID = "4ff1ed26-34ee-4a3a-a9bb-5a9ef2a3c1d6"
ONE_KIND = "exactly one of customer_global_ids and lead_ids must be given"
(HANDLER,) = (handler for handler in handlers_of(graph) if handler.subject == SUBJECT)


def body(**fields: Any) -> bytes:
    envelope = {
        "event_id": "0d9cfa7e-9f10-4b5a-9d4e-0d6d3f3f8a11",
        "event_version": "1.0",
        "occurred_at": "2026-01-05T10:00:00+08:00",
        "status": "closed",
    }
    return json.dumps(envelope | fields).encode()


@pytest.mark.parametrize("kind", ["customer_global_ids", "lead_ids"])
def test_ids_of_one_kind_and_unknown_fields_are_read(kind: str) -> None:
    parsed = HANDLER.parse(body(**{kind: [ID], "by": "王五"}))
    assert isinstance(parsed, LeadChanged)
    assert getattr(parsed, kind) == (UUID(ID),)
    assert (parsed.status, parsed.model_extra) == ("closed", {"by": "王五"})


def test_null_is_not_given() -> None:
    assert HANDLER.parse(body(lead_ids=[ID], customer_global_ids=None)).lead_ids == (UUID(ID),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ONE_KIND),
        ({"lead_ids": None}, ONE_KIND),
        ({"lead_ids": [ID], "customer_global_ids": [ID]}, ONE_KIND),
        ({"lead_ids": []}, "field lead_ids: Tuple should have at least 1 item after validation, not 0"),
        (
            {"customer_global_ids": []},
            "field customer_global_ids: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            {"lead_ids": [str(uuid4())] * (MOST_IDS + 1)},
            "field lead_ids: Tuple should have at most 1000 items after validation, not 1001",
        ),
        ({"lead_ids": ID}, "field lead_ids: Input should be a valid array"),
        ({"lead_ids": [ID, "7"]}, "field lead_ids.1: Input should be a valid UUID"),
        ({"lead_ids": [7]}, "field lead_ids.0: "),
        ({"lead_ids": [None]}, "field lead_ids.0: "),
        ({"lead_ids": {"id": ID}}, "field lead_ids: "),
        ({"lead_ids": [ID], "status": None}, "field status is missing"),
    ],
)
def test_wrong_event_is_rejected_with_one_sentence(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidEventError) as raised:
        HANDLER.parse(body(**fields))
    assert raised.value.reason.startswith(reason)
    assert "\n" not in raised.value.reason


def test_most_ids_fit_into_the_smallest_event_that_may_be_set() -> None:
    event = LeadChanged(lead_ids=tuple(uuid4() for _ in range(MOST_IDS)))
    assert len(event.model_dump_json(exclude_none=True)) < BridgeSettings.model_fields["event_max_bytes"].metadata[0].ge


def test_publisher_checks_the_same() -> None:
    assert event_type(SUBJECT) is LeadChanged
    with pytest.raises(ValidationError, match=ONE_KIND):
        LeadChanged()


def test_installation_without_the_asset_does_not_listen_to_its_events() -> None:
    """扔下不管的事件不是没有人要：有 leads 的监听器来了，从头读起。"""
    without = AssetGraph.of(asset for asset in graph.assets if asset.name != "leads")
    assert SUBJECT not in {handler.subject for handler in handlers_of(without)}
