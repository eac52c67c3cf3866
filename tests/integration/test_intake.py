"""导入事件进台账：受影响的日子，等待与忽略。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import ledger, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.intake.imports import ImportEvent, read_affected_days, request_imports
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.materialization import RunContext
from etl_assets.testing.raw_data import SAMPLE_ORDER, RawData


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, 0, tzinfo=UTC)


def requested_days(engine: sa.Engine) -> dict[date, int]:
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(ledger.c.day, ledger.c.requested).where(ledger.c.asset == "orders", ledger.c.requested > 0)
        )
        return {row.day: row.requested for row in rows}


def test_days_of_all_versions_of_the_named_orders_are_requested(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
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


def test_event_that_is_delivered_again_does_not_hide_a_newer_one(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """`etl wait` 看的是处理过的最新的那个。"""
    import_id = raw_data.add_import([{}])
    for sequence in (12, 10):
        request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=sequence)])
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT stream_sequence FROM etl.import_events").scalar() == 12


def test_pending_and_missing_imports_are_told_apart(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
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


@pytest.mark.parametrize("change", ["UPDATE shop_configs SET shop_name = '改了名'", "DELETE FROM shop_configs"])
def test_withdrawn_import_that_nobody_announced_counts_if_its_rows_are_in_orders_whatever_became_of_the_shop(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, change: str
) -> None:
    loaded = raw_data.add_import([{"order_id": " A-1 "}])
    superseded = raw_data.add_import([{}], completed_at=datetime(2026, 5, 1, tzinfo=UTC))
    days = DayRange(date(2026, 1, 5), date(2026, 1, 5))
    materialize_orders(engine, etl_settings, days, RunContext(run_id="run", assets=frozenset()))
    for import_id in (loaded, superseded):
        raw_data.set_status(import_id, "failed")
    with engine.begin() as connection:
        connection.exec_driver_sql(change)
    events = [ImportEvent(import_id, uuid4()) for import_id in (loaded, superseded)]
    assert request_imports(engine, etl_settings, events) == ["requested", "irrelevant"]


def test_import_of_ten_years_asks_for_every_day_and_rejects_what_has_no_partition(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    first = datetime(2012, 1, 1, 4, tzinfo=UTC)
    ten_years = [{"order_id": f"A-{day}", "ordered_at": first + timedelta(days=day)} for day in range(3_653)]
    outside = [{"order_id": f"B-{year}", "ordered_at": datetime(year, 1, 1, 4, tzinfo=UTC)} for year in (1990, 2100)]
    import_id = raw_data.add_import([*ten_years, *outside])
    assert request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())]) == ["requested"]
    assert requested_days(engine) == {(first + timedelta(days=day)).date(): 1 for day in range(3_653)}
    with engine.connect() as connection:
        assert set(connection.scalars(sa.select(rejected_rows.c.rule))) == {"outside_partitions"}
        assert connection.scalar(sa.select(sa.func.count()).select_from(rejected_rows)) == 2


def test_many_small_imports_are_joined_without_comparing_each_with_each(
    engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """新的数据库还没有统计；PostgreSQL 崩溃一次，也不记得该去统计了。"""
    imports = [uuid4() for _ in range(6_000)]
    with engine.begin() as connection:
        done = {"status": "completed", "completed_at": at(1)}
        connection.execute(sa.insert(import_tasks), [done | {"import_id": import_id} for import_id in imports])
        orders = [
            dict(SAMPLE_ORDER) | {"order_id": f"A-{n}-{line}", "import_id": import_id}
            for n, import_id in enumerate(imports)
            for line in range(2)
        ]
        connection.execute(sa.insert(raw_orders), orders)
    with engine.connect() as connection, recorded_plans(connection) as plans:
        assert len(read_affected_days(connection, etl_settings, imports[-256:])) == 256
    assert sum(node.get("Rows Removed by Join Filter", 0) for plan in plans for node in nodes(plan)) < 10 * len(imports)


@contextmanager
def recorded_plans(connection: sa.Connection) -> Iterator[list[dict[str, Any]]]:
    """期间的每条查询真正用的计划，连同各步的行数。"""
    statements: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    plans: list[dict[str, Any]] = []
    sa.event.listen(connection, "before_cursor_execute", record)
    yield plans
    sa.event.remove(connection, "before_cursor_execute", record)
    for statement, parameters in statements:
        ((answer,),) = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).all()
        plans.append(answer[0]["Plan"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def test_rows_without_a_partition_are_rejected_at_once(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    rows = [
        {"ordered_at": None},
        {"ordered_at": datetime(1999, 12, 1, tzinfo=UTC)},
        {"order_id": None, "ordered_at": None},
    ]
    import_id = raw_data.add_import(rows)
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())])
    with engine.connect() as connection:
        rejected = connection.execute(
            sa.select(rejected_rows.c.rule, rejected_rows.c.day).order_by(rejected_rows.c.raw_id)
        ).all()
    assert [tuple(row) for row in rejected] == [
        ("missing_ordered_at", None),
        ("outside_partitions", date(1999, 12, 1)),
        ("missing_order_id", None),
    ]
    assert requested_days(engine) == {}


def test_rows_without_an_order_id_or_shop_name_no_order(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """空白的号不是同一个订单：不要求别的空白号的日子；自己的日子要，坏行也要上账。"""
    blank = [{"order_id": "　"}, {"shop": "  "}, {"order_id": None}, {"order_id": ""}]
    for day in range(5, 10):
        raw_data.add_import([row | {"ordered_at": at(day)} for row in blank])
    newest = raw_data.add_import([row | {"ordered_at": at(20)} for row in blank])
    assert request_imports(engine, etl_settings, [ImportEvent(newest, uuid4())]) == ["requested"]
    assert requested_days(engine) == {date(2026, 1, 20): 1}
