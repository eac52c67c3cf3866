"""基准填的历史正是产品会写下的：与逐行参照一样，产品重做每一天也什么都不改，台账里没有到期的。"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from benchmarks.history import History, changes_of_product, fill_history
from benchmarks.verification import count_wrong
from bridge.demo.reference import find_differences
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import counted_imports, day_accounts, import_requests, ledger, order_index
from etl_assets.core.tables import target_tables
from etl_assets.intake.imports import read_affected_days
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

HISTORY = History(date(2026, 1, 5), days=120, imports=150, orders=450, customers=60)
MONTHS = [
    DayRange(HISTORY.last_day - timedelta(days=30 * number + 29), HISTORY.last_day - timedelta(days=30 * number))
    for number in range(4)
]
HISTORY_DAYS = {HISTORY.day_of(number) for number in range(HISTORY.orders)}


@pytest.fixture
def filled(chain: Chain, raw_data: RawData) -> Chain:  # noqa: ARG001  # 店铺与类型
    fill_history(chain.engine, chain.settings, HISTORY)
    return chain


def test_tables_are_those_of_the_reference(filled: Chain) -> None:
    assert find_differences(filled.engine, filled.settings) == []
    assert not any(count_wrong(filled.engine).values())


def test_product_changes_nothing_and_owes_nothing(filled: Chain) -> None:
    assert not filled.rows(sa.select(ledger.c.day).where(ledger.c.requested > ledger.c.materialized))
    assert list(changes_of_product(filled.engine, filled.settings, MONTHS)) == []


def test_product_counts_the_same(filled: Chain) -> None:
    """账与账上的导入，产品整天重数一遍也一样。"""
    account = sa.cast(day_accounts.c.account, pg.JSONB).op("-")("run_id")
    of_days = sa.select(day_accounts.c.day, account).order_by(day_accounts.c.day)
    of_imports = sa.select(counted_imports).order_by(counted_imports.c.day, counted_imports.c.import_id)
    before = filled.rows(of_days), filled.rows(of_imports)
    for days in MONTHS:
        filled.run(days.first, days.last)
    assert (filled.rows(of_days), filled.rows(of_imports)) == before
    assert len(before[0]) == len(HISTORY_DAYS)


@pytest.mark.parametrize(
    "row", [{"order_id": "N-1"}, {"order_id": "H-7", "order_status": "cancelled"}], ids=["new order", "new version"]
)
def test_event_does_only_what_changed(filled: Chain, raw_data: RawData, row: dict[str, str]) -> None:
    number = 7
    moment = datetime.combine(HISTORY.day_of(number), time(4), UTC)
    import_id = raw_data.add_import([{"customer_name": HISTORY.customer_of(number), "ordered_at": moment, **row}])
    filled.announce(import_id)
    filled.run_due()
    assert [report.scope for report in filled.reports[-3:]] == ["changed"] * 3
    assert not any(count_wrong(filled.engine).values())


def test_product_index_and_requests_would_be_the_same(filled: Chain) -> None:
    """索引按产品的键重写一遍也一样；每次导入要求的正是它影响的日子。"""
    requests = import_requests.c
    requested = {(import_id, day) for import_id, day in filled.rows(sa.select(requests.import_id, requests.day))}
    import_ids = sorted({import_id for import_id, _ in requested})
    # 算的是此刻的影响：后来又来一次的版本，日子相同
    with filled.engine.connect() as connection:
        assert {
            (row.import_id, row.day) for row in read_affected_days(connection, filled.settings, import_ids)
        } == requested
    before = filled.rows(sa.select(order_index).order_by(order_index.c.order_id))
    filled.execute(sa.delete(order_index))
    for days in MONTHS:
        filled.run(days.first, days.last)
    assert filled.rows(sa.select(order_index).order_by(order_index.c.order_id)) == before


def test_a_wrong_row_is_found(filled: Chain) -> None:
    filled.execute(sa.text("UPDATE orders SET amount = amount + 1 WHERE order_id = 'H-7'"))
    assert count_wrong(filled.engine)["orders"] == 1
    assert list(changes_of_product(filled.engine, filled.settings, [DayRange(HISTORY.day_of(7), HISTORY.day_of(7))]))


def test_orders_are_where_the_history_says(filled: Chain) -> None:
    orders = target_tables("public").orders.c
    found = {
        order_id: tuple(of_it)
        for order_id, *of_it in filled.rows(sa.select(orders.order_id, orders.order_date, orders.customer_nickname))
    }
    for number in (0, 1, 250, HISTORY.orders - 1):
        assert found[f"H-{number}"] == (HISTORY.day_of(number), HISTORY.customer_of(number))
