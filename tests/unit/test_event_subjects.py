"""主题：与 DOMAIN 第 7 节一致，死信主题与流的覆盖关系。"""

from __future__ import annotations

import pytest

from bridge.events import subjects
from bridge.jetstream import header_bytes, header_text, subject_covers


def test_subjects_are_those_of_the_contract() -> None:
    assert subjects.DATA_IMPORT_COMPLETED == "events.data_import.completed"
    assert subjects.ETL_COMPLETED == {
        "orders": "events.etl.orders.completed",
        "customers": "events.etl.customers.completed",
        "leads": "events.etl.leads.completed",
    }


def test_dead_letter_keeps_the_rest_of_the_subject() -> None:
    assert subjects.dead_letter_subject(subjects.DATA_IMPORT_COMPLETED) == "events_dlq.data_import.completed"


@pytest.mark.parametrize(
    ("pattern", "subject", "covered"),
    [
        ("events.>", "events.etl.orders.completed", True),
        (">", "events.x", True),
        ("events.>", "events", False),
        ("events.*.completed", "events.data_import.completed", True),
        ("events.*.completed", "events.etl.orders.completed", False),
        ("events.*", "events.a.b", False),
        ("events.a", "events.a", True),
        ("events.a", "events.ab", False),
        ("events.*.>", "events.a", False),
        ("events.*.>", "events.a.b", True),
    ],
)
def test_stream_patterns_cover_subjects_as_nats_does(pattern: str, subject: str, covered: bool) -> None:
    assert subject_covers(pattern, subject) is covered


def test_header_text_is_one_printable_line() -> None:
    assert header_text("坏行\r\nInjected: yes\x00\x1b[31m  end") == "坏行 Injected: yes[31m end"
    assert len(header_text("x" * 1_000)) == 300


def test_header_bytes_count_what_goes_over_the_wire() -> None:
    assert header_bytes({"A": "坏"}) == len("NATS/1.0\r\nA: 坏\r\n\r\n".encode())
