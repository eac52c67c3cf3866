"""资产来了、走了、改了名，台账里已有旧的日子：先前的导入照样走完，补做一遍就有了历史，人重跑旧的一天也记得对。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from uuid import UUID

import pytest
import sqlalchemy as sa

from etl_assets.core.etl_tables import ledger, stale_customers
from etl_assets.core.tables import target_tables
from etl_assets.ledger.claims import claim_due_days
from etl_assets.ledger.failures import hold_days, record_failure
from etl_assets.ledger.graph import Asset, AssetGraph, catch_up, read_graph, write_graph
from etl_assets.ledger.requests import request_days
from etl_assets.orders import lost_rows
from etl_assets.orders.recount import find_wrong_days
from etl_assets.reports.progress import import_progress, range_progress
from etl_assets.reports.reports import held_days, ledger_summary
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain, DayRange
from tests.integration.engine.extra_assets import extras
from tests.the_three import graph

DAYS = [date(2026, 1, 5), date(2026, 1, 6)]
NEXT = date(2026, 1, 7)
PRODUCTS = Asset("products", frozenset(["orders"]))
REPORT = Asset("daily_report", frozenset(["customers", "products"]))
WIDER = AssetGraph.of([*graph.assets, PRODUCTS, REPORT])


def order_of(day: date) -> dict[str, object]:
    return {"order_id": f"A-{day.day}", "ordered_at": datetime(day.year, day.month, day.day, 4, tzinfo=UTC)}


@pytest.fixture
def import_id(chain: Chain, raw_data: RawData) -> UUID:
    """做完了的导入，两天；那时还没有 products 与 daily_report。"""
    import_id = raw_data.add_import([order_of(day) for day in DAYS])
    chain.announce(import_id)
    chain.run_due()
    return import_id


def now(chain: Chain) -> datetime:
    ((moment,),) = chain.rows(sa.select(sa.func.clock_timestamp()))
    assert isinstance(moment, datetime)
    return moment


def is_done(chain: Chain, import_id: UUID) -> bool:
    with chain.engine.connect() as connection:
        progress = import_progress(connection, chain.settings, import_id)
    return progress.handled and progress.done == progress.days > 0


def contents(chain: Chain) -> set[tuple[str, date]]:
    return {(asset, day) for asset, day in chain.rows(sa.select(extras.c.asset, extras.c.day))}


def test_old_days_are_neither_due_nor_made_and_the_earlier_import_stays_done(chain: Chain, import_id: UUID) -> None:
    chain.use_graph(WIDER)
    rows = chain.rows(
        sa.select(ledger.c.asset, ledger.c.day, ledger.c.run_id).where(ledger.c.asset.in_(["products", "daily_report"]))
    )
    assert sorted(rows) == sorted((asset, day, None) for asset in ("products", "daily_report") for day in DAYS)
    assert chain.due_days() == []
    assert is_done(chain, import_id)


def test_backfill_of_the_new_asset_fills_its_history_and_what_follows_it_only(chain: Chain, import_id: UUID) -> None:
    chain.use_graph(WIDER)
    with chain.engine.begin() as connection:
        request_days(connection, "public", DAYS, asset="products")
    assert chain.due_runs() == dict.fromkeys(DAYS, frozenset(["products", "daily_report"]))
    chain.run_due()
    assert contents(chain) == {(asset, day) for asset in ("products", "daily_report") for day in DAYS}
    with chain.engine.connect() as connection:
        assert range_progress(connection, chain.settings, DayRange(*DAYS)).done == 2
    chain.assert_converged()
    assert is_done(chain, import_id)


@pytest.mark.usefixtures("import_id")
def test_backfill_of_an_asset_is_not_held_up_by_a_branch_that_it_does_not_touch(chain: Chain) -> None:
    chain.use_graph(WIDER)
    with chain.engine.begin() as connection:
        request_days(connection, "public", DAYS, asset="leads")
        hold_days(connection, "public", ["leads"], DayRange(*DAYS), cancelled="of leads")
        request_days(connection, "public", DAYS, asset="products")

    def progress(asset: str | None) -> tuple[int, int, str | None]:
        with chain.engine.connect() as connection:
            found = range_progress(connection, chain.settings, DayRange(*DAYS), asset=asset)
        return found.done, found.held, found.held_reason

    assert progress(None) == (0, 2, "run of leads was cancelled")
    assert progress("products") == (0, 0, None)
    with chain.engine.begin() as connection:
        hold_days(connection, "public", ["products"], DayRange(*DAYS), cancelled="of products")
    assert progress("daily_report") == (0, 2, "run of products was cancelled")
    assert progress("leads") == (0, 2, "run of leads was cancelled")


@pytest.mark.usefixtures("import_id")
@pytest.mark.parametrize(("asked", "is_held"), [("products", True), ("customers", False), (None, False)])
def test_failure_of_an_asset_holds_the_day_unless_what_it_depends_on_was_asked_for_meanwhile(
    chain: Chain, asked: str | None, is_held: bool
) -> None:
    chain.use_graph(WIDER)
    day = DayRange(DAYS[0], DAYS[0])
    with chain.engine.begin() as connection:
        request_days(connection, "public", day, asset="customers")
    began_at = now(chain)
    with chain.engine.begin() as connection:
        request_days(connection, "public", day, asset=asked)
        record_failure(
            connection, "public", ["customers", "leads"], day, reason="no luck", kind="permanent", began_at=began_at
        )
        assert {row["asset"] for row in held_days(connection, chain.settings)} == ({"customers"} if is_held else set())


@pytest.mark.usefixtures("import_id")
@pytest.mark.parametrize(("made_by", "is_held"), [("the run that fails", True), ("another run", False)])
def test_failure_holds_the_day_unless_another_run_made_its_upstream_meanwhile(
    chain: Chain, made_by: str, is_held: bool
) -> None:
    began_at = now(chain)
    chain.run(DAYS[0], assets=["orders"])
    ((run_id,),) = chain.rows(sa.select(ledger.c.run_id).where(ledger.c.asset == "orders", ledger.c.day == DAYS[0]))
    failed_run_id = run_id if made_by == "the run that fails" else "other"
    day = DayRange(DAYS[0], DAYS[0])
    with chain.engine.begin() as connection:
        record_failure(
            connection,
            "public",
            ["customers"],
            day,
            reason="no luck",
            kind="permanent",
            run_id=failed_run_id,
            began_at=began_at,
        )
        assert bool(held_days(connection, chain.settings)) == is_held


def test_rerun_of_an_old_day_by_a_person_marks_it_right(chain: Chain, import_id: UUID) -> None:
    chain.use_graph(WIDER)
    chain.run(DAYS[0], assets=["products"])
    assert chain.due_runs() == {DAYS[0]: frozenset(["daily_report"])}
    chain.run_due()
    assert contents(chain) == {("products", DAYS[0]), ("daily_report", DAYS[0])}
    assert is_done(chain, import_id)
    chain.run(DAYS[0])
    assert chain.due_days() == []


def test_import_that_is_on_its_way_reaches_the_new_asset_too(chain: Chain, raw_data: RawData) -> None:
    """订单到期时来了新资产：它跟着做，先前的导入等的也有它。"""
    import_id = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(import_id)
    chain.use_graph(WIDER)
    chain.run(DAYS[0], assets=["orders", "customers", "leads"], is_of_event=True)
    assert not is_done(chain, import_id)
    assert chain.due_runs() == {DAYS[0]: frozenset(["products", "daily_report"])}
    chain.run_due()
    assert is_done(chain, import_id)
    chain.assert_converged()


def test_days_that_come_later_have_all_assets(chain: Chain, raw_data: RawData, import_id: UUID) -> None:  # noqa: ARG001
    chain.use_graph(WIDER)
    later = raw_data.add_import([order_of(NEXT)])
    chain.announce(later)
    assert chain.due_runs() == {NEXT: frozenset(WIDER.names)}
    chain.run_due()
    assert is_done(chain, later)


@pytest.mark.parametrize("then", ["nothing", "a rerun of leads", "a request for leads", "another import"])
@pytest.mark.parametrize("left_out", ["row", "revision"])
def test_assets_that_an_older_version_left_out_catch_up(
    chain: Chain, raw_data: RawData, left_out: str, then: str
) -> None:
    """0.1.0 的监听器不给它不认识的资产补行，它的工人不往它们交；此后别的推进了这一天，也不当它们做过。"""
    chain.use_graph(WIDER)
    import_id = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(import_id)
    others = ledger.c.asset.in_(["products", "daily_report"])
    if left_out == "row":
        chain.execute(sa.delete(ledger).where(others))
    chain.run(DAYS[0], assets=["orders", "customers", "leads"])
    chain.execute(sa.update(ledger).values(requested=ledger.c.materialized).where(others))
    assert chain.due_runs() == {}
    assert not is_done(chain, import_id)
    if then == "a rerun of leads":
        chain.run(DAYS[0], assets=["leads"])
    elif then == "a request for leads":
        with chain.engine.begin() as connection:
            request_days(connection, "public", DAYS[:1], asset="leads")
    elif then == "another import":
        chain.announce(raw_data.add_import([order_of(DAYS[0]) | {"order_id": "B"}]))
    with chain.engine.begin() as connection:
        assert catch_up(connection, "public") == (then == "nothing" or (then, left_out) == ("a rerun of leads", "row"))
        assert not catch_up(connection, "public")
    assert chain.due_runs()[DAYS[0]] >= {"products", "daily_report"}
    chain.run_due()
    assert is_done(chain, import_id)
    chain.assert_converged()


def test_what_an_older_worker_did_not_pass_on_is_made_as_a_whole(chain: Chain, raw_data: RawData) -> None:
    """它做到了前一个版本，没有留下标记；后一个版本由新的工人交下去，说不出前一个变了什么。"""
    chain.use_graph(WIDER)
    orders = [order_of(DAYS[0]) | {"order_id": name} for name in "ABC"]
    chain.announce(raw_data.add_import(orders[:1]))
    chain.run_due()
    for order in orders[1:]:
        chain.announce(raw_data.add_import([order]))
    chain.run(DAYS[0], assets=["orders"])
    of_orders, of_others = ledger.c.asset == "orders", ledger.c.asset.in_(["products", "daily_report"])
    chain.execute(sa.update(ledger).where(of_orders).values(materialized=ledger.c.requested - 1))
    chain.execute(sa.update(ledger).where(of_others).values(requested=ledger.c.materialized, changed_since=0))
    chain.run(DAYS[0], assets=["orders"], is_of_event=True)
    is_whole = sa.select(ledger.c.changed_since > ledger.c.materialized).where(ledger.c.asset == "products")
    assert chain.rows(is_whole) == [(True,)]
    chain.run_due()
    chain.assert_converged()


def test_asset_that_is_taken_away_stops_nobody(chain: Chain, raw_data: RawData) -> None:
    """它到期、搁置着就被拿走了：谁也不再看它。"""
    chain.use_graph(WIDER)
    import_id = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(import_id)
    chain.run(DAYS[0], assets=["orders", "customers", "leads"])
    with chain.engine.begin() as connection:
        record_failure(
            connection, "public", ["products"], DayRange(DAYS[0], DAYS[0]), reason="no luck", kind="permanent"
        )
    assert not is_done(chain, import_id)
    chain.use_graph(graph)
    assert is_done(chain, import_id)
    with chain.engine.begin() as connection:
        assert held_days(connection, chain.settings) == []
        assert [row["asset"] for row in ledger_summary(connection, chain.settings)] == list(graph.names)
        assert claim_due_days(connection, "public", run_id="run", owner="test", lease_seconds=60) is None
    later = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(later)
    chain.run_due()
    assert is_done(chain, later)


def test_asset_that_comes_back_catches_up(chain: Chain, raw_data: RawData) -> None:
    """退回去又升上来：其间变了的日子到期，没变的不动。"""
    chain.use_graph(WIDER)
    chain.announce(raw_data.add_import([order_of(day) for day in DAYS]))
    chain.run_due()
    chain.use_graph(graph)
    chain.announce(raw_data.add_import([order_of(DAYS[0]) | {"amount": "99.00"}]))
    chain.run_due()
    chain.use_graph(WIDER)
    assert chain.due_runs() == {DAYS[0]: frozenset(["products", "daily_report"])}
    chain.run_due()
    chain.assert_converged()


@pytest.mark.parametrize("left", ["orders", "orders and customers"])
def test_assets_by_customer_that_come_back_know_who_left_meanwhile(chain: Chain, raw_data: RawData, left: str) -> None:
    """一天里不再有订单的客户，那一天的运行找不到他：走了的，别的日子还有订单的，订单换了人的。"""
    raw_data.add_import([order_of(DAYS[0]) | {"customer_name": name, "order_id": name} for name in ("甲", "乙", "丙")])
    chain.announce(raw_data.add_import([order_of(NEXT) | {"customer_name": "乙", "order_id": "乙-2"}]))
    chain.announce(
        withdrawn := raw_data.add_import(
            [order_of(day) | {"customer_name": "丁", "order_id": f"丁-{day}"} for day in DAYS]
        )
    )
    chain.run_due()
    chain.use_graph(AssetGraph.of(asset for asset in graph.assets if asset.name in left))
    chain.announce(
        raw_data.add_import([order_of(DAYS[0]) | {"customer_name": "戊", "order_id": name} for name in ("甲", "乙")])
    )
    chain.run_due()
    raw_data.set_status(withdrawn, "failed")
    chain.announce(withdrawn)
    chain.run_due()
    chain.use_graph(graph)
    chain.run_due()
    chain.assert_converged()
    assert chain.rows(sa.select(stale_customers.c.mark_id)) == []


def test_asset_that_comes_back_makes_the_days_that_came_meanwhile(chain: Chain, raw_data: RawData) -> None:
    chain.use_graph(WIDER)
    chain.use_graph(graph)
    chain.announce(import_id := raw_data.add_import([order_of(NEXT)]))
    chain.run_due()
    chain.use_graph(WIDER)
    assert chain.due_runs() == {NEXT: frozenset(["products", "daily_report"])}
    chain.run_due()
    chain.assert_converged()
    assert is_done(chain, import_id)


def test_renamed_asset_is_a_new_one(chain: Chain, raw_data: RawData) -> None:
    chain.use_graph(WIDER)
    import_id = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(import_id)
    chain.run_due()
    renamed = AssetGraph.of(
        [*graph.assets, Asset("goods", frozenset(["orders"])), Asset("daily_report", frozenset(["customers", "goods"]))]
    )
    chain.use_graph(renamed)
    assert (chain.due_days(), is_done(chain, import_id)) == ([], True)
    with chain.engine.begin() as connection:
        request_days(connection, "public", DAYS[:1], asset="goods")
    chain.run_due()
    chain.assert_converged()


def test_asset_whose_upstream_became_external_still_ends_the_import(chain: Chain, raw_data: RawData) -> None:
    """products 原来跟着 orders，现在自己从原始数据做：正在路上的导入也等得到它。"""
    chain.use_graph(WIDER)
    import_id = raw_data.add_import([order_of(DAYS[0])])
    chain.announce(import_id)
    chain.use_graph(AssetGraph.of([*graph.assets, Asset("products"), REPORT]))
    assert chain.due_runs() == {DAYS[0]: frozenset([*graph.names, "products", "daily_report"])}
    chain.run_due()
    assert is_done(chain, import_id)


# ---- 另一个没有上游的资产 ----------------------------------------------------------

WITH_WEATHER = AssetGraph.of([*graph.assets, Asset("weather")])


def test_rows_are_looked_for_once_orders_is_done_whatever_else_is(chain: Chain, raw_data: RawData) -> None:
    chain.use_graph(WITH_WEATHER)
    chain.announce(raw_data.add_import([order_of(DAYS[0])], completed_at=datetime(2026, 1, 8, tzinfo=UTC)))
    chain.run(DAYS[0], assets=["weather"])
    with chain.engine.connect() as connection:
        assert lost_rows.rows_nowhere(connection, chain.settings) is None
    chain.run_due()
    chain.execute(sa.delete(target_tables("public").orders))
    with chain.engine.connect() as connection:
        nowhere = lost_rows.rows_nowhere(connection, chain.settings)
    assert (nowhere and nowhere.rows) == 1


def test_account_is_counted_again_once_orders_is_done_whatever_else_is(chain: Chain, raw_data: RawData) -> None:
    chain.use_graph(WITH_WEATHER)
    chain.announce(raw_data.add_import([order_of(DAYS[0])]))
    chain.run_due()
    chain.execute(sa.delete(target_tables("public").orders))
    with chain.engine.begin() as connection:
        assert find_wrong_days(connection, chain.settings) == DAYS[:1]
        request_days(connection, "public", DAYS[:1], asset="orders")
        assert find_wrong_days(connection, chain.settings) == []


# ---- 谁写下图 ----------------------------------------------------------------------


def test_older_worker_that_restarts_does_not_put_the_old_graph_back(chain: Chain) -> None:
    def write(wanted: AssetGraph, *, if_new: bool) -> bool:
        with chain.engine.begin() as connection:
            return write_graph(connection, "public", wanted, if_new=if_new)

    assert write(WIDER, if_new=True)
    assert not write(graph, if_new=True)
    assert chain.graph == WIDER
    assert write(graph, if_new=False)  # 旧版本的 init-db：有意退回去
    assert not write(WIDER, if_new=True)
    assert chain.graph == graph
    assert not write(graph, if_new=False)


def test_graph_is_read_back_as_it_was_written(chain: Chain) -> None:
    chain.use_graph(WIDER)
    with chain.engine.connect() as connection:
        assert read_graph(connection, "public") == WIDER
