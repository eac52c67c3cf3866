"""发件箱：完成事件与数据同生共死。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import outbox
from etl_assets.customers import etl as customers_etl
from etl_assets.ledger.outbox import Completion, add_completion, delete_published, installation_id, read_unpublished
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

DAY = date(2026, 1, 5)
NEXT = date(2026, 1, 6)


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def events(connection: sa.Connection) -> list[tuple[str, dict[str, Any]]]:
    return [(row.asset, row.payload) for row in read_unpublished(connection, limit=100)]


def test_each_asset_leaves_one_completion_with_its_data(
    chain: Chain, raw_data: RawData, connection: sa.Connection
) -> None:
    import_id = raw_data.add_import([{}, {"order_id": "B"}])
    chain.announce(import_id)
    chain.run(DAY)
    found = events(connection)
    assert [asset for asset, _ in found] == ["orders", "customers", "leads"]
    for _, payload in found:
        assert payload["event_version"] == "1.0"
        assert UUID(payload["event_id"]).version == 4
        assert datetime.now(UTC) - datetime.fromisoformat(payload["occurred_at"]) < timedelta(minutes=5)
        assert (payload["status"], payload["partitions"], payload["import_ids"]) == (
            "success",
            ["2026-01-05"],
            [str(import_id)],
        )
        assert payload["installation"] == str(installation_id(connection))
        assert payload["duration_seconds"] >= 0
        assert "error" not in payload
    assert [payload["success_count"] for _, payload in found] == [2, 1, 2]
    assert [payload["error_count"] for _, payload in found] == [0, 0, 0]
    assert [payload["downstream"] for _, payload in found] == ["included", "included", "pending"]
    assert len({payload["run_id"] for _, payload in found}) == 1


def test_asset_that_runs_alone_says_that_the_next_is_pending(
    chain: Chain, raw_data: RawData, connection: sa.Connection
) -> None:
    raw_data.add_import([{}])
    chain.run(DAY, assets=["orders"])
    ((_, payload),) = events(connection)
    assert payload["downstream"] == "pending"


def test_rejected_rows_make_a_partial_success(chain: Chain, raw_data: RawData, connection: sa.Connection) -> None:
    raw_data.add_import([{}, {"order_id": "B", "quantity": -1}])
    chain.run(DAY, assets=["orders"])
    ((_, payload),) = events(connection)
    assert (payload["status"], payload["success_count"], payload["error_count"]) == ("partial_success", 1, 1)


def test_range_lists_every_day(chain: Chain, raw_data: RawData, connection: sa.Connection) -> None:
    raw_data.add_import([{}])
    chain.run(DAY, date(2026, 1, 7), assets=["orders"])
    ((_, payload),) = events(connection)
    assert payload["partitions"] == ["2026-01-05", "2026-01-06", "2026-01-07"]


def test_completion_vanishes_with_a_rolled_back_run(
    chain: Chain, raw_data: RawData, connection: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain.announce(raw_data.add_import([{}]))

    def fail_after_everything(*_: Any) -> None:
        raise RuntimeError("killed before the commit")

    monkeypatch.setattr("etl_assets.services.materialization.judge_fence", fail_after_everything)
    with pytest.raises(RuntimeError, match="killed before the commit"):
        chain.run(DAY, assets=["orders"])
    assert events(connection) == []
    assert chain.rows(sa.select(sa.table("orders", sa.column("order_id")).c.order_id)) == []
    assert chain.due_days("orders") == [DAY]


def test_run_that_fails_midway_keeps_the_completions_of_the_assets_that_committed(
    chain: Chain, raw_data: RawData, connection: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain.announce(raw_data.add_import([{}]))

    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(customers_etl, "transform", refuse)
    with pytest.raises(RuntimeError, match="no"):
        chain.run(DAY)
    assert [asset for asset, _ in events(connection)] == ["orders"]
    assert chain.due_days("customers") == [DAY]


def test_events_are_read_oldest_first_and_stay_until_they_are_deleted(connection: sa.Connection) -> None:
    for run_id in "abc":
        failed = Completion(
            asset="orders",
            days=DayRange(DAY, NEXT),
            run_id=run_id,
            status="failed",
            downstream="pending",
            error="no luck",
        )
        add_completion(connection, "public", failed)
    first_two = read_unpublished(connection, limit=2)
    assert [row.payload["run_id"] for row in first_two] == ["a", "b"]
    assert all(row.payload["error"] == "no luck" and row.payload["event_id"] == str(row.event_id) for row in first_two)
    delete_published(connection, [row.outbox_id for row in first_two])
    assert [row.payload["run_id"] for row in read_unpublished(connection, limit=2)] == ["c"]


def test_event_that_is_not_committed_cannot_be_published(engine: sa.Engine, connection: sa.Connection) -> None:
    completion = Completion(
        asset="orders", days=DayRange(DAY, DAY), run_id="run", status="success", downstream="pending"
    )
    with engine.connect() as other, other.begin() as transaction:
        add_completion(other, "public", completion)
        assert other.scalar(sa.select(sa.func.count()).select_from(outbox)) == 1
        assert events(connection) == []
        transaction.rollback()
    assert events(connection) == []
