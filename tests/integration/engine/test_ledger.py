"""台账：什么时候到期，做完、重跑、失败、搁置之后各是什么样。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import DatabaseRefusedError, FailureKind
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.ledger.claims import claim_due_days, has_claimable_days
from etl_assets.ledger.failures import FAILED_DAY, MAX_FAILURES, record_failure
from etl_assets.ledger.graph import write_graph
from etl_assets.ledger.marking import read_revisions, waiting_imports
from etl_assets.ledger.requests import days_allowing_deletes, request_days, request_downstream
from etl_assets.reports.progress import import_progress
from etl_assets.services.fingerprints import fingerprint
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import ASSETS, Chain, mark_materialized, read_and_mark
from tests.the_three import graph

DAY = date(2026, 1, 5)
NEXT = date(2026, 1, 6)
TARGET = "public"


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    """自动提交：每条语句都是别人看得见的一步。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def due(connection: sa.Connection, day: date = DAY) -> set[str]:
    statement = sa.select(ledger.c.asset).where(
        ledger.c.target == TARGET, ledger.c.day == day, ledger.c.requested > ledger.c.materialized
    )
    return set(connection.scalars(statement))


def entry(connection: sa.Connection, asset: str, day: date = DAY) -> sa.Row[Any]:
    statement = sa.select(ledger).where(ledger.c.target == TARGET, ledger.c.asset == asset, ledger.c.day == day)
    return connection.execute(statement).one()


def materialize(connection: sa.Connection, asset: str, *days: date) -> list[UUID]:
    """读台账，马上做完：两步之间没有别的事。"""
    span = DayRange(min(days, default=DAY), max(days, default=DAY))
    return read_and_mark(connection, TARGET, asset, span)


def fail(connection: sa.Connection, kind: FailureKind = "unknown", *, times: int = 1) -> None:
    for _ in range(times):
        record_failure(connection, TARGET, ASSETS, DayRange(DAY, DAY), reason="no luck", kind=kind)


# ---- 到期与做完 ------------------------------------------------------------------


def test_requested_day_becomes_due_asset_by_asset(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    assert due(connection) == {"orders"}
    materialize(connection, "orders")
    assert due(connection) == {"customers"}
    materialize(connection, "customers")
    assert due(connection) == {"leads"}
    materialize(connection, "leads")
    assert due(connection) == set()


def test_only_the_days_of_the_run_are_marked(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY, NEXT, NEXT])
    materialize(connection, "orders")
    assert (due(connection), due(connection, NEXT)) == ({"customers"}, {"orders"})


def test_request_that_comes_during_a_run_keeps_the_day_due(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    revisions = read_revisions(connection, TARGET, "orders", DayRange(DAY, DAY), fingerprint(EtlSettings()))
    request_days(connection, TARGET, [DAY])
    mark_materialized(connection, TARGET, "orders", DayRange(DAY, DAY), revisions, run_id="run", scope="whole")
    assert due(connection) == {"orders", "customers"}
    materialize(connection, "orders")
    assert due(connection) == {"customers"}


def test_slow_run_does_not_take_back_what_a_later_one_has_done(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    old = read_revisions(connection, TARGET, "orders", DayRange(DAY, DAY), fingerprint(EtlSettings()))
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    mark_materialized(connection, TARGET, "orders", DayRange(DAY, DAY), old, run_id="slow", scope="whole")
    assert due(connection) == {"customers"}


def test_rerun_of_one_asset_makes_what_follows_due_and_nothing_else(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    for asset in ASSETS:
        materialize(connection, asset)
    materialize(connection, "orders")
    assert due(connection) == {"customers"}
    materialize(connection, "customers")
    materialize(connection, "leads")
    assert due(connection) == set()
    materialize(connection, "customers")
    assert due(connection) == {"leads"}


def test_rerun_of_a_day_that_nobody_asked_for_counts_too(connection: sa.Connection) -> None:
    materialize(connection, "orders")
    assert due(connection) == {"customers"}


def test_downstream_alone_is_not_done_while_its_upstream_is_due(connection: sa.Connection) -> None:
    """orders 还到期：customers 提前跑一次，不能让 leads 以为全程都新了。"""
    request_days(connection, TARGET, [DAY])
    materialize(connection, "customers")
    assert due(connection) == {"orders"}
    materialize(connection, "orders")
    assert due(connection) == {"customers"}


def test_run_and_moment_are_recorded(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    row = entry(connection, "orders")
    assert row.run_id == "run"
    assert row.requested_at <= row.materialized_at <= datetime.now(UTC)


def test_targets_have_ledgers_of_their_own(connection: sa.Connection, engine: sa.Engine) -> None:
    with pytest.raises(DatabaseRefusedError, match="no worker has written down the assets of target schema shadow yet"):
        request_days(connection, "shadow", [DAY])
    with engine.begin() as transaction:
        write_graph(transaction, "shadow", graph)
    request_days(connection, "shadow", [DAY])
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    shadow = sa.select(ledger.c.asset).where(ledger.c.target == "shadow", ledger.c.requested > ledger.c.materialized)
    assert connection.scalars(shadow).all() == ["orders"]


# ---- 别处的 ETL ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elsewhere", "follows"), [("orders", {"customers"}), ("customers", {"leads"}), ("leads", set())]
)
def test_asset_done_elsewhere_makes_the_next_one_due(
    connection: sa.Connection, elsewhere: str, follows: set[str]
) -> None:
    request_downstream(connection, TARGET, elsewhere, [DAY])
    assert due(connection) == follows
    request_downstream(connection, TARGET, elsewhere, [DAY])
    for asset in ASSETS[ASSETS.index(elsewhere) + 1 :]:
        materialize(connection, asset)
    assert due(connection) == set()


def test_asset_done_elsewhere_does_not_hide_our_own_request(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    request_downstream(connection, TARGET, "orders", [DAY])
    assert due(connection) == {"orders"}
    materialize(connection, "orders")
    assert due(connection) == {"customers"}


# ---- 失败与搁置 ------------------------------------------------------------------


def test_failed_day_waits_twice_as_long_each_time_and_is_then_held(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    waits = []
    for _ in range(MAX_FAILURES - 1):
        fail(connection)
        now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        waits.append((entry(connection, "orders").retry_at - now).total_seconds())
        assert not has_claimable_days(connection, TARGET)
    assert waits == pytest.approx([5, 10, 20, 40], abs=2)
    fail(connection)
    row = entry(connection, "orders")
    assert (row.failures, row.retry_at, row.held_reason) == (MAX_FAILURES, None, "no luck")
    assert due(connection) == {"orders"}


def test_failed_day_is_tried_again_once_its_wait_is_over(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    fail(connection)
    connection.execute(sa.update(ledger).values(retry_at=sa.func.clock_timestamp()))
    assert has_claimable_days(connection, TARGET)


def test_permanent_failure_is_held_at_once(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    fail(connection, "permanent")
    assert entry(connection, "orders").held_reason == "no luck"
    assert not has_claimable_days(connection, TARGET)


def test_any_text_is_a_reason(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    record_failure(
        connection, TARGET, ["orders"], DayRange(DAY, DAY), reason="nul \x00 and half \ud800", kind="permanent"
    )
    assert entry(connection, "orders").held_reason == "nul \ufffd and half ?"


def test_transient_failures_are_never_held_and_are_tried_less_often_the_longer_they_last(
    connection: sa.Connection,
) -> None:
    request_days(connection, TARGET, [DAY])
    waits = []
    for minutes in (0, 1, 60):
        connection.execute(
            sa.update(ledger).values(requested_at=sa.func.clock_timestamp() - timedelta(minutes=minutes))
        )
        fail(connection, "transient", times=MAX_FAILURES)
        now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        row = entry(connection, "orders")
        assert (row.failures, row.held_reason) == (0, None)
        waits.append((row.retry_at - now).total_seconds())
    assert waits == pytest.approx([FAILED_DAY.first_seconds, 30, FAILED_DAY.longest_seconds], abs=2)


def test_failure_does_not_touch_what_is_already_done(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    fail(connection, "permanent")
    assert [entry(connection, asset).held_reason for asset in ASSETS] == [None, "no luck", None]


def test_new_request_clears_the_hold_of_the_whole_chain(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    fail(connection, times=MAX_FAILURES)
    request_days(connection, TARGET, [DAY])
    assert [(entry(connection, asset).failures, entry(connection, asset).held_reason) for asset in ASSETS] == [
        (0, None)
    ] * 3
    assert has_claimable_days(connection, TARGET)


def test_new_upstream_revision_clears_the_hold_of_what_follows(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    fail(connection, "permanent")
    materialize(connection, "orders")
    row = entry(connection, "customers")
    assert (row.failures, row.retry_at, row.held_reason) == (0, None, None)


def test_success_clears_earlier_failures(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY])
    fail(connection, times=3)
    materialize(connection, "orders")
    row = entry(connection, "orders")
    assert (row.failures, row.retry_at, row.held_reason) == (0, None, None)


# ---- 允许大量删除 ----------------------------------------------------------------


def test_permission_to_delete_lasts_until_the_request_is_done(connection: sa.Connection) -> None:
    request_days(connection, TARGET, [DAY], deletes_allowed_on=[DAY])
    request_days(connection, TARGET, [DAY, NEXT])
    allowed = days_allowing_deletes(TARGET, "orders", DayRange(DAY, NEXT))
    assert connection.scalars(allowed).all() == [DAY]
    materialize(connection, "orders")
    assert connection.scalars(allowed).all() == []


# ---- 导入走到哪里 ----------------------------------------------------------------


def test_import_is_finished_by_the_run_that_reaches_its_revision(
    connection: sa.Connection, chain: Chain, raw_data: RawData, etl_settings: EtlSettings
) -> None:
    import_id = raw_data.add_import([{}, {"order_id": "B", "ordered_at": datetime(2026, 1, 6, 4, tzinfo=UTC)}])
    chain.announce(import_id)
    assert waiting_imports(connection, TARGET, "orders", DayRange(DAY, NEXT)) == [import_id]
    assert materialize(connection, "orders", DAY) == [import_id]
    assert materialize(connection, "orders", DAY) == []
    assert materialize(connection, "orders", NEXT) == [import_id]
    assert waiting_imports(connection, TARGET, "orders", DayRange(DAY, NEXT)) == []
    assert waiting_imports(connection, TARGET, "leads", DayRange(DAY, NEXT)) == [import_id]
    for asset in ("customers", "leads"):
        materialize(connection, asset, DAY)
    progress = import_progress(connection, etl_settings, import_id)
    assert (progress.handled, progress.days, progress.done, progress.held) == (True, 2, 1, 0)


def test_import_that_comes_during_a_run_is_not_finished_by_it(
    connection: sa.Connection, chain: Chain, raw_data: RawData
) -> None:
    first = raw_data.add_import([{}])
    chain.announce(first)
    revisions = read_revisions(connection, TARGET, "orders", DayRange(DAY, DAY), fingerprint(EtlSettings()))
    second = raw_data.add_import([{}])
    chain.announce(second)
    assert mark_materialized(
        connection, TARGET, "orders", DayRange(DAY, DAY), revisions, run_id="run", scope="whole"
    ) == [first]
    assert materialize(connection, "orders") == [second]


def test_held_days_of_an_import_are_reported(
    connection: sa.Connection, engine: sa.Engine, raw_data: RawData, etl_settings: EtlSettings
) -> None:
    import_id = raw_data.add_import([{}])
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())])
    fail(connection, "permanent")
    progress = import_progress(connection, etl_settings, import_id)
    assert (progress.done, progress.held, progress.held_reason) == (0, 1, "no luck")


# ---- 真的运行 --------------------------------------------------------------------


def test_materializing_marks_each_asset_in_turn(chain: Chain, raw_data: RawData) -> None:
    chain.announce(raw_data.add_import([{}]))
    for asset, left in zip(ASSETS, (["customers"], ["leads"], []), strict=True):
        chain.run(DAY, assets=[asset])
        assert [name for name in ASSETS if chain.due_days(name)] == left


def test_run_of_orders_alone_leaves_what_follows_due(chain: Chain, raw_data: RawData) -> None:
    chain.announce(raw_data.add_import([{}]))
    chain.run_due()
    chain.run(DAY, assets=["orders"])
    assert (chain.due_days("orders"), chain.due_days("customers")) == ([], [DAY])
    chain.run_due()
    assert chain.due_days() == []


def test_claim_of_a_day_that_failed_downstream_starts_there(connection: sa.Connection, engine: sa.Engine) -> None:
    request_days(connection, TARGET, [DAY])
    materialize(connection, "orders")
    with engine.begin() as transaction:
        claim = claim_due_days(transaction, TARGET, run_id="run", owner="test", lease_seconds=60)
    assert claim is not None
    assert claim.assets == ("customers", "leads")
