"""主题：与 DOMAIN 第 7 节一致，死信主题与流的覆盖关系。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge.events import subjects
from bridge.jetstream.headers import header_bytes, header_text
from bridge.jetstream.streams import subject_covers


def test_subjects_are_those_of_the_contract() -> None:
    assert subjects.DATA_IMPORT_COMPLETED == "events.data_import.completed"
    assert subjects.etl_completed("orders") == subjects.ORDERS_ETL_COMPLETED == "events.etl.orders.completed"
    assert subjects.etl_completed("customers") == subjects.CUSTOMERS_ETL_COMPLETED == "events.etl.customers.completed"
    assert subjects.etl_completed("leads") == subjects.LEADS_ETL_COMPLETED == "events.etl.leads.completed"


@pytest.mark.parametrize("asset", ["orders", "daily_report", "sales/products"])
def test_asset_of_a_completion_is_in_its_subject(asset: str) -> None:
    assert subjects.completed_asset(subjects.etl_completed(asset)) == asset


@pytest.mark.parametrize(
    "subject", [subjects.DATA_IMPORT_COMPLETED, "events.etl.orders.failed", "events_dlq.etl.orders.completed"]
)
def test_other_subjects_are_of_no_asset(subject: str) -> None:
    assert subjects.completed_asset(subject) is None


def test_prefix_of_events_is_written_once() -> None:
    package = Path(subjects.__file__).parents[1]
    written = [
        (path.name, line)
        for folder in (package, package.parent / "etl_assets", package.parent / "benchmarks")
        for path in folder.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"""["']events\.""", line)
    ]
    assert written == [("nats_names.py", 'EVENTS_PREFIX = "events."')]


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
