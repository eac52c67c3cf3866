"""DOMAIN 第 6 节点名的竞争，每个都用手交错：一个运行停在某条语句之前，另一个趁这时做完，或被拦住。

共有一天、一个订单、一个新客户、一个商机的两个运行，读写之间提交的关闭，以及陈旧标记，在 test_materialization；
栅栏本身在 test_leases。
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import TransientError
from etl_assets.core.etl_tables import leases
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.ledger.claims import Claim, claim_due_days
from etl_assets.ledger.leases import current_lease, delete_expired_lease, release_lease
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.interleaving import WorkerDied, giving_way, interleaved, wait_until, writes_to

DAY = date(2026, 1, 5)
OTHER_DAY = date(2026, 1, 7)
TABLES = target_tables("public")
ORDERS, CUSTOMERS, LEADS = TABLES.orders, TABLES.customers, TABLES.leads


def at(day: int, *, month: int = 1) -> datetime:
    return datetime(2026, month, day, 4, tzinfo=UTC)


def later(hour: int) -> datetime:
    """导入完成的时刻：越大越新。"""
    return datetime(2026, 6, 1, hour, tzinfo=UTC)


def bring(chain: Chain, raw_data: RawData, *rows: dict[str, Any], hour: int) -> UUID:
    """一次导入完成，它的事件也到了。"""
    import_id = raw_data.add_import(rows, completed_at=later(hour))
    chain.announce(import_id)
    return import_id


def withdraw(chain: Chain, raw_data: RawData, import_id: UUID) -> None:
    raw_data.set_status(import_id, "failed")
    chain.announce(import_id)


# ---- 订单 ------------------------------------------------------------------------


def test_run_that_deletes_an_order_does_not_delete_its_return_on_another_day(chain: Chain, raw_data: RawData) -> None:
    """唯一的版本撤回了，正要删；新的版本在别的一天，除了 orders 里那一行，两个运行没有共同的日子。"""
    only = bring(chain, raw_data, {"ordered_at": at(5)}, hour=1)
    chain.run_due()
    withdraw(chain, raw_data, only)
    with interleaved(chain.engine, before=writes_to("public.orders")) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["orders"]))
        both.meanwhile(lambda: (bring(chain, raw_data, {"ordered_at": at(7)}, hour=2), chain.run(OTHER_DAY)))
        both.resume()
    chain.run_due()
    chain.assert_converged()


def test_two_runs_that_need_the_days_of_each_other_do_not_deadlock(chain: Chain, raw_data: RawData) -> None:
    """一个从五号找到七号，另一个从七号找到五号：放开重锁，按序，所以谁也不用重来。"""
    bring(chain, raw_data, {"order_id": "A", "ordered_at": at(5)}, {"order_id": "B", "ordered_at": at(7)}, hour=1)
    bring(chain, raw_data, {"order_id": "A", "ordered_at": at(7)}, {"order_id": "B", "ordered_at": at(5)}, hour=2)
    with capture_logs() as logs, interleaved(chain.engine, before=writes_to("etl.ledger")) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["orders"]))
        assert not both.meanwhile(lambda: chain.run(OTHER_DAY, assets=["orders"])).done()
        both.resume()
    assert [entry for entry in logs if "conflict" in entry["event"]] == []
    chain.run_due()
    chain.assert_converged()


# ---- 客户 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asset", "table"),
    [("customers", "public.business_leads"), ("customers", "public.customers"), ("leads", "public.business_leads")],
    ids=["customers deletes the leads", "customers deletes the customer", "leads deletes the leads"],
)
def test_customer_that_returns_while_it_is_deleted_is_there_in_the_end(
    chain: Chain, raw_data: RawData, asset: str, table: str
) -> None:
    """张三的订单归了李四；正要删他时，他在别的一天又下了单。"""
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    bring(chain, raw_data, {"customer_name": "李四"}, hour=2)
    chain.run(DAY, assets=["orders"])
    with interleaved(chain.engine, before=writes_to(table, how="DELETE FROM")) as both:
        assert both.begin(lambda: chain.run(DAY, assets=[asset]))
        bring(chain, raw_data, {"order_id": "B", "ordered_at": at(7)}, hour=3)
        assert not both.meanwhile(lambda: chain.run(OTHER_DAY)).done()
        both.resume()
    chain.run_due()
    chain.assert_converged()
    assert len(chain.expected().customers) == 2


def test_order_that_changes_customers_while_both_are_computed_is_counted_once(chain: Chain, raw_data: RawData) -> None:
    """customers 读到 A 属于张三；写之前 A 归了李四。"""
    bring(chain, raw_data, {"order_id": "A"}, {"order_id": "B"}, hour=1)
    chain.run_due()
    with interleaved(chain.engine, before=writes_to("public.customers")) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["customers"]))
        bring(chain, raw_data, {"order_id": "A", "customer_name": "李四", "ordered_at": at(7)}, hour=2)
        assert not both.meanwhile(chain.run_due).done()
        both.resume()
    chain.run_due()
    chain.assert_converged()


# ---- COLD 清扫 -------------------------------------------------------------------


def test_sweep_waits_for_another_and_then_sees_the_newest_day(chain: Chain, raw_data: RawData) -> None:
    """第一个清扫读过最新的一天就停下，第二个得等它；等的时候最新的一天又前移了，轮到第二个时它得看见。"""
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    bring(chain, raw_data, {"order_id": "B", "customer_name": "李四", "ordered_at": at(1, month=3)}, hour=2)
    chain.run(date(2026, 3, 1), assets=["orders"])
    with interleaved(chain.engine, before=writes_to("etl.cold_sweeps")) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["leads"]))
        assert not both.meanwhile(chain.run_due).done()
        bring(chain, raw_data, {"order_id": "C", "customer_name": "李四", "ordered_at": at(6, month=5)}, hour=3)
        chain.run(date(2026, 5, 6), assets=["orders"])
        both.resume()
    assert chain.rows(sa.select(LEADS.c.current_stage).where(LEADS.c.last_order_at == at(5))) == [("COLD",)]
    chain.run_due()
    chain.assert_converged()


def test_run_that_dies_before_its_sweep_leaves_no_lead_warm(chain: Chain, raw_data: RawData) -> None:
    """重跑一天的运行按旧的最新一天算好；新的一天来了，要清扫，得等它写完；它写下之后死在自己的清扫之前。"""
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    with interleaved(chain.engine, before=writes_to("public.business_leads")) as both:
        assert both.begin(lambda: run_until_the_sweep(chain))
        bring(chain, raw_data, {"order_id": "B", "customer_name": "李四", "ordered_at": at(6, month=5)}, hour=2)
        assert not both.meanwhile(chain.run_due).done()
        with suppress(WorkerDied):
            both.resume()
    assert chain.due_days() == []
    chain.assert_converged()


def run_until_the_sweep(chain: Chain) -> None:
    engine, is_sweep = chain.engine.execution_options(), writes_to("etl.cold_sweeps")

    def die(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if is_sweep(statement):
            raise WorkerDied

    sa.event.listen(engine, "before_cursor_execute", die)
    Chain(engine, chain.settings).run(DAY, assets=["leads"])


# ---- 事件 ------------------------------------------------------------------------


def test_import_withdrawn_before_its_event_while_a_run_has_read_it_leaves_no_order(
    chain: Chain, raw_data: RawData
) -> None:
    """为别的事重跑这一天的运行读到了它，还没写；两个事件这时才到，orders 里还看不到它。"""
    bring(chain, raw_data, {"order_id": "B"}, hour=1)
    chain.run_due()
    unannounced = raw_data.add_import([{}], completed_at=later(2))
    with interleaved(chain.engine, before=writes_to("public.orders")) as both:
        assert both.begin(lambda: chain.run(DAY))
        raw_data.set_status(unannounced, "failed")
        both.meanwhile(lambda: (chain.announce(unannounced), chain.announce(unannounced)))
        both.resume()
    chain.run_due()
    chain.assert_converged()


def test_rows_without_a_day_of_a_withdrawn_import_are_not_rejected_by_its_earlier_event(
    chain: Chain, raw_data: RawData
) -> None:
    """两个监听者：一个正处理完成的事件，另一个处理完了撤回的事件。"""
    import_id = raw_data.add_import([{"ordered_at": None}], completed_at=later(1))
    with interleaved(chain.engine, before=writes_to("etl.rejected_rows")) as both:
        assert both.begin(lambda: chain.announce(import_id))
        raw_data.set_status(import_id, "failed")
        both.meanwhile(lambda: chain.announce(import_id))
        both.resume()
    chain.run_due()
    chain.assert_converged()


# ---- 人 --------------------------------------------------------------------------


def test_closing_taken_back_after_the_orders_have_left_lets_the_customer_go(chain: Chain, raw_data: RawData) -> None:
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    chain.execute(sa.update(LEADS).values(closed_by="user", closed_at=at(6), current_stage="LOST"))
    bring(chain, raw_data, {"customer_name": "李四"}, hour=2)
    chain.run_due()
    chain.execute(sa.update(LEADS).where(LEADS.c.closed_by == "user").values(closed_by=None, closed_at=None))
    chain.run(DAY)
    chain.assert_converged()


@pytest.mark.parametrize("change", ["a lead changes", "leads deletes", "customers deletes", "leads turn cold"])
def test_person_who_changes_leads_in_an_order_of_his_own_is_nobodys_victim(
    chain: Chain, raw_data: RawData, change: str
) -> None:
    """他改着一个；运行正要写他的和别的。等了他一秒多，他再改别的，死锁里输的就是他。"""
    rows = [{"order_id": f"{number}", "customer_name": f"客户{number}", "order_status": "new"} for number in range(20)]
    bring(chain, raw_data, *rows, hour=1)
    chain.run_due()
    if change == "leads turn cold":
        bring(chain, raw_data, {"order_id": "B", "customer_name": "李四", "ordered_at": at(6, month=5)}, hour=2)
        days, asset = date(2026, 5, 6), "leads"
    else:
        edit = {"order_status": "completed"} if change == "a lead changes" else {"customer_name": "李四"}
        bring(chain, raw_data, *[row | edit for row in rows], hour=2)
        days, asset = DAY, "customers" if change == "customers deletes" else "leads"
    chain.run(days, assets=["orders"])
    mine = LEADS.c.lead_id == lead_id_of(chain, "客户19")
    with_notes = sa.update(LEADS).values(notes="人的话")
    with ThreadPoolExecutor(1) as pool, giving_way(chain.engine) as has_given_way:
        with chain.engine.begin() as person:
            person.execute(with_notes.where(mine))
            running = pool.submit(chain.run, days, assets=[asset])
            wait_until(lambda: running.done() or has_given_way() or waits_longer_than_deadlocks_take(chain))
            assert not running.done()
            person.execute(with_notes.where(~mine))
        running.result(timeout=30)
    chain.run_due()
    chain.assert_converged()
    assert chain.rows(sa.select(LEADS.c.notes).where(mine)) == [("人的话",)]


def test_person_who_adds_a_lead_that_a_run_adds_too_is_nobodys_victim(chain: Chain, raw_data: RawData) -> None:
    """运行等着他插入的那个键；他再改运行也要改的那个，得改得了。"""
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    bring(chain, raw_data, {}, {"order_id": "B", "ordered_at": at(6), "order_status": "new"}, hour=2)
    chain.run(DAY, date(2026, 1, 6), assets=["orders", "customers"])
    customer = chain.rows(sa.select(CUSTOMERS.c.customer_global_id))[0][0]
    with ThreadPoolExecutor(1) as pool:
        with chain.engine.begin() as person:
            person.execute(sa.insert(LEADS).values(lead_id=UUID(int=2), customer_global_id=customer, lead_no=2))
            running = pool.submit(chain.run, DAY, date(2026, 1, 6), assets=["leads"])
            wait_until(lambda: running.done() or waits_longer_than_deadlocks_take(chain))
            assert not running.done()
            person.execute(sa.update(LEADS).where(LEADS.c.lead_no == 1).values(notes="人的话"))
        running.result(timeout=30)
    chain.run_due()
    chain.assert_converged()


def lead_id_of(chain: Chain, customer_name: str) -> UUID:
    theirs = sa.and_(
        CUSTOMERS.c.customer_global_id == LEADS.c.customer_global_id, CUSTOMERS.c.customer_nickname == customer_name
    )
    ((lead_id,),) = chain.rows(sa.select(LEADS.c.lead_id).join(CUSTOMERS, theirs))
    return UUID(str(lead_id))


def waits_longer_than_deadlocks_take(chain: Chain) -> bool:
    """有人等锁等过了 deadlock_timeout：它自己不再看有没有死锁，下一个等的才看，而且输。"""
    waiting = sa.text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND query_start < clock_timestamp() - 1.2 * CAST(current_setting('deadlock_timeout') AS interval))"
    )
    with chain.engine.connect() as connection:
        return bool(connection.scalar(waiting))


def test_lead_let_go_between_customers_and_leads_lets_the_customer_go(chain: Chain, raw_data: RawData) -> None:
    """customers 看到字还在，留下了客户；leads 看到字没了，删了商机。"""
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    chain.execute(sa.update(LEADS).values(owner="王五"))
    bring(chain, raw_data, {"customer_name": "李四"}, hour=2)
    chain.run(DAY, assets=["orders", "customers"])
    chain.execute(sa.update(LEADS).where(LEADS.c.owner == "王五").values(owner=None))
    chain.run(DAY, assets=["leads"])
    assert len(chain.rows(sa.select(CUSTOMERS.c.customer_key))) == 2
    chain.run(OTHER_DAY)
    chain.assert_converged()


@pytest.mark.parametrize(
    "change",
    [
        {"owner": None},
        {"current_stage": "LOST"},
        {"closed_by": "user"},
        {"closed_by": "user", "closed_at": at(9), "current_stage": "LOST"},
        {"closed_by": "etl", "closed_at": at(9), "current_stage": "WON"},
    ],
    ids=repr,
)
def test_change_of_a_lead_without_orders_is_seen_by_the_run_of_any_day(
    chain: Chain, raw_data: RawData, change: dict[str, Any]
) -> None:
    bring(chain, raw_data, {"order_status": "new"}, hour=1)
    chain.run_due()
    chain.execute(sa.update(LEADS).values(owner="王五"))
    bring(chain, raw_data, {"customer_name": "李四"}, hour=2)
    chain.run_due()
    chain.execute(sa.update(LEADS).where(LEADS.c.owner == "王五").values(**change))
    chain.run(OTHER_DAY)
    chain.assert_converged()


def test_closing_taken_back_is_seen_by_the_run_of_any_day(chain: Chain, raw_data: RawData) -> None:
    """订单也重新分过，不只是改了阶段。"""
    bring(
        chain, raw_data, {"order_status": "new"}, {"order_id": "B", "ordered_at": at(7), "order_status": "new"}, hour=1
    )
    chain.run_due()
    chain.execute(sa.update(LEADS).values(closed_by="user", closed_at=at(6), current_stage="LOST"))
    chain.run(DAY)
    assert len(chain.rows(sa.select(LEADS.c.lead_id))) == 2
    chain.execute(sa.update(LEADS).where(LEADS.c.closed_by == "user").values(closed_by=None, closed_at=None))
    chain.run(date(2026, 1, 9))
    chain.assert_converged()


# ---- 停住的工人 ------------------------------------------------------------------


def test_stopped_worker_loses_its_transaction_and_its_successor_writes(
    chain: Chain, raw_data: RawData, etl_settings: EtlSettings
) -> None:
    """工人停在事务中间，手里还有锁：服务器到时断开它，接手的不必等它醒来，醒来的它什么也写不了。

    停住的只是它的线程，进程还活着：替它照看事务的到一条语句的时限为止。
    """
    bring(chain, raw_data, {}, hour=1)
    settings = etl_settings.model_copy(update={"statement_timeout_seconds": 1, "idle_transaction_timeout_seconds": 1})
    impatient = build_engine(settings)
    stopped = claim(chain, "stopped")
    with interleaved(impatient, before=writes_to("public.orders")) as both:
        assert both.begin(lambda: run_under(stopped, Chain(impatient, settings)))
        chain.execute(sa.update(leases).values(expires_at=sa.func.clock_timestamp()))
        with chain.engine.begin() as connection:
            delete_expired_lease(connection, "stopped")
        successor = claim(chain, "successor")
        waiting = both.meanwhile(lambda: run_under(successor, chain))
        assert not waiting.done()
        waiting.result(timeout=30)
        chain.assert_converged()
        with pytest.raises(TransientError):
            both.resume()
    impatient.dispose()
    chain.assert_converged()
    assert chain.due_days() == []


def claim(chain: Chain, run_id: str) -> Claim:
    with chain.engine.begin() as connection:
        claimed = claim_due_days(connection, "public", run_id=run_id, owner="test", lease_seconds=60)
    assert claimed is not None
    return claimed


def run_under(claimed: Claim, chain: Chain) -> None:
    token = current_lease.set(claimed.lease)
    try:
        chain.run(claimed.days.first, claimed.days.last, assets=claimed.assets)
    finally:
        current_lease.reset(token)
    with chain.engine.begin() as connection:
        release_lease(connection, claimed.lease)
