"""导入事件进台账：受影响的日子，等待与忽略。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from uuid import uuid4

import sqlalchemy as sa

from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import ledger, rejected_rows
from etl_assets.services.intake import ImportEvent, request_imports
from etl_assets.testing.raw_data import RawData


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, 0, tzinfo=UTC)


def requested_days(engine: sa.Engine) -> dict[date, int]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(ledger.c.day, ledger.c.requested).where(ledger.c.asset == "orders", ledger.c.requested > 0))
        return {row.day: row.requested for row in rows}


def test_days_of_all_versions_of_the_named_orders_are_requested(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    raw_data.add_import([{"ordered_at": at(5)}, {"order_id": "other", "ordered_at": at(6)}])
    newer = raw_data.add_import([{"order_id": " A-1 ", "ordered_at": at(9)}])
    outcomes = request_imports(engine, etl_settings, [ImportEvent(newer, uuid4())])
    assert outcomes == ["requested"]
    assert requested_days(engine) == {date(2026, 1, 5): 1, date(2026, 1, 9): 1}


def test_same_event_again_asks_for_nothing_new(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    event = ImportEvent(raw_data.add_import([{}]), uuid4())
    assert request_imports(engine, etl_settings, [event]) == ["requested"]
    assert request_imports(engine, etl_settings, [event]) == ["known"]
    assert requested_days(engine) == {date(2026, 1, 5): 1}


def test_pending_and_missing_imports_are_told_apart(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    pending = raw_data.add_import([{}], status="pending")
    events = [ImportEvent(pending, uuid4()), ImportEvent(uuid4(), uuid4())]
    assert request_imports(engine, etl_settings, events) == ["pending", "missing"]
    assert requested_days(engine) == {}


def test_withdrawn_import_counts_its_own_days_only_if_it_was_requested(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    never_seen = raw_data.add_import([{"order_id": "B"}], status="failed")
    seen = raw_data.add_import([{"ordered_at": at(7)}])
    request_imports(engine, etl_settings, [ImportEvent(seen, uuid4())])
    raw_data.set_status(seen, "failed")
    events = [ImportEvent(never_seen, uuid4()), ImportEvent(seen, uuid4())]
    assert request_imports(engine, etl_settings, events) == ["irrelevant", "requested"]
    assert requested_days(engine) == {date(2026, 1, 7): 2}


def test_rows_without_a_partition_are_rejected_at_once(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    rows = [{"ordered_at": None}, {"ordered_at": datetime(1999, 12, 1, tzinfo=UTC)}, {"order_id": None, "ordered_at": None}]
    import_id = raw_data.add_import(rows)
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())])
    with engine.connect() as connection:
        rejected = connection.execute(sa.select(rejected_rows.c.rule, rejected_rows.c.day).order_by(rejected_rows.c.raw_id)).all()
    assert [tuple(row) for row in rejected] == [
        ("missing_ordered_at", None),
        ("outside_partitions", date(1999, 12, 1)),
        ("missing_order_id", None),
    ]
    assert requested_days(engine) == {}
