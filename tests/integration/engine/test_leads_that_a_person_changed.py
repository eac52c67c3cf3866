"""人关闭、收回、改派了商机，应用说了一声：这些客户的商机重新分，与逐行的参照一样，别的谁也不碰。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from etl_assets.core.asset_events import Asked
from etl_assets.core.business_day import DayRange, partition_range
from etl_assets.core.etl_tables import ledger, outbox, stale_customers
from etl_assets.core.tables import target_tables
from etl_assets.leads.events import LeadChanged
from etl_assets.ledger.failures import hold_days
from etl_assets.ledger.graph import Asset, AssetGraph
from etl_assets.ledger.leases import acquire_lease
from etl_assets.ledger.requests import request_days
from etl_assets.services.materialization import AssetReport
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.interleaving import WorkerDied, interleaved, writes_to
from tests.the_three import graph

DAY, NEXT, LAST = date(2026, 1, 5), date(2026, 1, 6), date(2026, 1, 9)
CUSTOMERS, LEADS = target_tables("public").customers, target_tables("public").leads
CUSTOMERS_OF_A_DAY = 8
REOPENED = {"closed_by": None, "closed_at": None, "current_stage": "OPEN"}
Name = Callable[[str], LeadChanged]


def at(day: date, hour: int = 4) -> datetime:
    return datetime(day.year, day.month, day.day, hour, tzinfo=UTC)


def closing(moment: datetime) -> dict[str, Any]:
    return {"closed_by": "user", "closed_at": moment, "current_stage": "LOST"}


@pytest.fixture
def done(chain: Chain, raw_data: RawData) -> Chain:
    """三天、三天都有订单的八个客户，一直没有成交；都做完了。王五只有头一天的。"""
    rows = [
        {"order_id": f"{number}-{day}", "customer_name": f"客户{number}", "ordered_at": at(day), "order_status": "new"}
        for number in range(CUSTOMERS_OF_A_DAY)
        for day in (DAY, NEXT, LAST)
    ]
    chain.announce(raw_data.add_import([*rows, {"order_id": "W", "customer_name": "王五", "order_status": "new"}]))
    chain.run_due()
    chain.reports.clear()
    return chain


def id_of(chain: Chain, customer: str) -> UUID:
    ((found,),) = chain.rows(sa.select(CUSTOMERS.c.customer_global_id).where(CUSTOMERS.c.customer_nickname == customer))
    return found  # type: ignore[no-any-return]  # 一列 uuid


def lead_of(chain: Chain, customer: str, lead_no: int = 1) -> UUID:
    of_lead = sa.and_(LEADS.c.customer_global_id == id_of(chain, customer), LEADS.c.lead_no == lead_no)
    ((found,),) = chain.rows(sa.select(LEADS.c.lead_id).where(of_lead))
    return found  # type: ignore[no-any-return]  # 同上


def change(chain: Chain, customer: str, values: Mapping[str, Any], lead_no: int = 1) -> None:
    """人在应用里改一个商机。"""
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_id == lead_of(chain, customer, lead_no)).values(**values))


@pytest.fixture(params=["customer_global_ids", "lead_ids"])
def name(request: pytest.FixtureRequest, done: Chain) -> Name:
    """说到一个客户：说他，或者说他的头一个商机。"""
    if request.param == "lead_ids":
        return lambda customer: LeadChanged(lead_ids=(lead_of(done, customer),))
    return lambda customer: LeadChanged(customer_global_ids=(id_of(done, customer),))


def numbers_of_orders(chain: Chain, customer: str) -> list[tuple[int, int]]:
    of_customer = LEADS.c.customer_global_id == id_of(chain, customer)
    return chain.rows(sa.select(LEADS.c.lead_no, LEADS.c.bulk_count).where(of_customer).order_by(LEADS.c.lead_no))  # type: ignore[return-value]


def work(chain: Chain) -> list[AssetReport]:
    """工人做到没有到期的，做了哪些；结果与参照一样。"""
    wanted = chain.expected()
    before = len(chain.reports)
    chain.run_due()
    chain.assert_converged(wanted)
    return chain.reports[before:]


def made(reports: list[AssetReport]) -> list[tuple[str, str, DayRange]]:
    return [(report.asset, report.scope, report.days) for report in reports]


def marks(chain: Chain) -> list[tuple[str, date | None]]:
    return chain.rows(sa.select(stale_customers.c.asset, stale_customers.c.day).order_by(stale_customers.c.asset))  # type: ignore[return-value]


# ---- 关闭、收回、改派 --------------------------------------------------------------


def test_closing_reopening_and_reassigning_deal_again_what_they_name(done: Chain, name: Name) -> None:
    steps: list[tuple[Mapping[str, Any], list[tuple[int, int]], int]] = [
        (closing(at(DAY, 12)), [(1, 1), (2, 2)], 2),
        (closing(at(NEXT, 12)), [(1, 2), (2, 1)], 2),
        ({"owner": "李四"}, [(1, 2), (2, 1)], 2),
        (REOPENED, [(1, 3)], 1),
    ]
    for values, dealt, rows in steps:
        change(done, "客户3", values)
        assert done.tell(name("客户3")) == [Asked("leads", [LAST], [])]
        assert made(reports := work(done)) == [("leads", "changed", DayRange(LAST, LAST))]
        assert reports[0].written.rows == rows
        assert numbers_of_orders(done, "客户3") == dealt


def test_without_the_event_a_closing_waits_for_a_day_of_its_customer(done: Chain) -> None:
    change(done, "客户3", closing(at(DAY, 12)))
    done.run_due()
    assert numbers_of_orders(done, "客户3") == [(1, 3)]


def test_completion_event_is_written(done: Chain, name: Name) -> None:
    done.execute(sa.delete(outbox))
    change(done, "客户3", closing(at(DAY, 12)))
    done.tell(name("客户3"))
    work(done)
    ((asset, payload),) = done.rows(sa.select(outbox.c.asset, outbox.c.payload))
    assert (asset, payload["status"], payload["partitions"], payload["success_count"]) == (
        "leads",
        "success",
        [str(LAST)],
        2,
    )


def test_event_told_twice_and_again_after_its_run_changes_nothing_more(done: Chain, name: Name) -> None:
    change(done, "客户3", closing(at(DAY, 12)))
    event = name("客户3")
    done.tell(event, event)
    done.tell(event)
    assert made(work(done)) == [("leads", "changed", DayRange(LAST, LAST))]
    done.tell(event)
    (again,) = work(done)
    assert (again.written.rows, again.written.inserted, again.written.updated, again.written.deleted) == (2, 0, 0, 0)
    assert marks(done) == []


# ---- 点名了谁 ----------------------------------------------------------------------


def test_ids_that_are_not_here_are_named_and_ask_for_nothing(done: Chain, name: Name) -> None:
    one, other = uuid4(), uuid4()
    events = [LeadChanged(lead_ids=(one, other)), LeadChanged(customer_global_ids=(one,))]
    assert done.tell(*events) == [Asked("leads", [], [str(one), str(other)]), Asked("leads", [], [str(one)])]
    assert done.due_days() == []
    assert marks(done) == []

    change(done, "客户3", closing(at(DAY, 12)))
    mixed = LeadChanged(lead_ids=(other, lead_of(done, "客户3")))
    assert done.tell(events[1], name("客户3"), mixed) == [
        Asked("leads", [], [str(one)]),
        Asked("leads", [LAST], []),
        Asked("leads", [LAST], [str(other)]),
    ]
    work(done)
    assert numbers_of_orders(done, "客户3") == [(1, 1), (2, 2)]


def test_customers_of_many_days_are_one_run_of_the_earliest_of_their_last_days(done: Chain) -> None:
    for customer, moment in (("王五", at(DAY, 1)), ("客户3", at(DAY, 12)), ("客户5", at(NEXT, 12))):
        change(done, customer, closing(moment))
    events = [
        LeadChanged(customer_global_ids=(id_of(done, "客户3"), id_of(done, "王五"))),
        LeadChanged(lead_ids=(lead_of(done, "客户5"),)),
    ]
    assert done.tell(*events) == [Asked("leads", [DAY], [])] * 2
    reports = work(done)
    assert made(reports) == [("leads", "changed", DayRange(DAY, DAY))]
    assert reports[0].written.rows == 6
    assert numbers_of_orders(done, "王五") == [(1, 0), (2, 1)]
    assert numbers_of_orders(done, "客户5") == [(1, 2), (2, 1)]


def test_customer_without_orders_goes_once_nobody_touches_its_lead(done: Chain, raw_data: RawData, name: Name) -> None:
    """他没有日子，所以是今天的；留不留下是 customers 的事，所以从它起。"""
    change(done, "王五", {"notes": "等他回来"})
    moved = {"order_id": "W", "customer_name": "赵六", "order_status": "new"}
    done.announce(raw_data.add_import([moved], completed_at=datetime(2026, 6, 2, tzinfo=UTC)))
    work(done)
    assert numbers_of_orders(done, "王五") == [(1, 0)]

    change(done, "王五", {"notes": None})
    today = partition_range(done.settings).last
    assert done.tell(name("王五")) == [Asked("customers", [today], [])]
    assert [asset for asset, _, _ in made(work(done))] == ["customers", "leads"]
    assert done.rows(sa.select(CUSTOMERS.c.customer_key).where(CUSTOMERS.c.customer_nickname == "王五")) == []


def test_lead_of_a_person_without_a_number_names_its_customer(done: Chain) -> None:
    own, customer_id = uuid4(), id_of(done, "客户3")
    done.execute(sa.insert(LEADS).values(lead_id=own, customer_global_id=customer_id, notes="人放进来的"))
    change(done, "客户3", closing(at(DAY, 12)))
    assert done.tell(LeadChanged(lead_ids=(own,))) == [Asked("leads", [LAST], [])]
    work(done)
    assert (2, 2) in numbers_of_orders(done, "客户3")


def test_only_assets_from_the_first_one_on_have_marks(done: Chain, name: Name) -> None:
    behind = Asset("behind", frozenset(["leads"]), by_customer=True)
    beside = Asset("beside", frozenset(["orders"]), by_customer=True)
    done.use_graph(AssetGraph.of([*graph.assets, behind, beside]))
    done.tell(name("客户3"))
    assert marks(done) == [("behind", LAST), ("leads", LAST)]


def test_other_target_knows_nothing_of_it(done: Chain, name: Name) -> None:
    done.tell(name("客户3"))
    assert {target for (target,) in done.rows(sa.select(stale_customers.c.target))} == {"public"}


# ---- 哪一天 ------------------------------------------------------------------------


def test_held_day_does_not_hold_up_a_closing(done: Chain, name: Name) -> None:
    with done.engine.begin() as connection:
        request_days(connection, "public", [LAST], changed_only=True)
        hold_days(connection, "public", graph.names, DayRange(LAST, LAST), cancelled="test")
    change(done, "客户3", closing(at(DAY, 12)))
    today = partition_range(done.settings).last
    assert done.tell(name("客户3")) == [Asked("leads", [today], [])]
    assert done.due_runs()[today] == {"leads"}


def test_day_that_a_run_has_is_left_to_it(done: Chain, name: Name) -> None:
    with done.engine.begin() as connection:
        assert acquire_lease(connection, "public", DayRange(NEXT, LAST), run_id="long", owner="test", lease_seconds=60)
    today = partition_range(done.settings).last
    assert done.tell(name("客户3")) == [Asked("leads", [today], [])]
    both = LeadChanged(customer_global_ids=(id_of(done, "客户3"), id_of(done, "王五")))
    assert done.tell(both) == [Asked("leads", [DAY], [])]


def test_where_every_day_is_busy_the_run_of_its_upstreams_deals_again_by_changes(
    done: Chain, raw_data: RawData, name: Name
) -> None:
    """上游还到期：leads 不抬，它们做完时轮到它；而且不因此整天做。"""
    rows = [
        {"order_id": f"N-{day}", "customer_name": "客户1", "ordered_at": at(day), "order_status": "new"}
        for day in (LAST,)
    ]
    import_id = raw_data.add_import(rows, completed_at=datetime(2026, 6, 2, tzinfo=UTC))
    done.announce(import_id)
    with done.engine.begin() as connection:
        request_days(connection, "public", [partition_range(done.settings).last])
    change(done, "客户3", closing(at(DAY, 12)))
    before = done.rows(sa.select(ledger).where(ledger.c.asset == "leads", ledger.c.day == LAST))
    assert done.tell(name("客户3")) == [Asked("leads", [LAST], [])]
    assert done.rows(sa.select(ledger).where(ledger.c.asset == "leads", ledger.c.day == LAST)) == before
    reports = done.run(LAST, is_of_event=True)
    assert [(report.asset, report.scope) for report in reports] == [(asset, "changed") for asset in graph.names]
    assert numbers_of_orders(done, "客户3") == [(1, 1), (2, 2)]


# ---- 与别的运行同时，死在半途 --------------------------------------------------------


def test_change_that_a_run_under_way_has_not_seen_is_dealt_by_the_next(done: Chain, name: Name) -> None:
    """运行读过人的列之后人才关闭：它消不掉此后的标记，也不算做了此后的要求。"""
    done.tell(name("客户3"))
    with interleaved(done.engine, before=writes_to("etl.ledger", how="UPDATE")) as both:
        assert both.begin(lambda: done.run(LAST, assets=["leads"], is_of_event=True))
        both.meanwhile(lambda: (change(done, "客户3", closing(at(DAY, 12))), done.tell(name("客户3"))))
        both.resume()
    assert done.due_runs() == {LAST: {"leads"}}
    work(done)
    assert numbers_of_orders(done, "客户3") == [(1, 1), (2, 2)]


@pytest.mark.parametrize("dies_before", ["business_leads", "ledger"])
def test_worker_that_dies_loses_nothing(done: Chain, name: Name, dies_before: str) -> None:
    change(done, "客户3", closing(at(DAY, 12)))
    done.tell(name("客户3"))
    table = LEADS.fullname if dies_before == "business_leads" else ledger.fullname
    with interleaved(done.engine, before=writes_to(table)) as both:
        assert both.begin(lambda: done.run(LAST, assets=["leads"], is_of_event=True))
        with suppress(WorkerDied):
            both.resume(dies=True)
    assert marks(done) == [("leads", LAST)]
    assert made(work(done)) == [("leads", "changed", DayRange(LAST, LAST))]
    assert numbers_of_orders(done, "客户3") == [(1, 1), (2, 2)]
    assert marks(done) == []
