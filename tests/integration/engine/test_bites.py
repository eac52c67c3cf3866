"""大的运行一口一口地做：口与口之间别的运行照走，死在那里也不要紧。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from etl_assets.core.etl_tables import cold_sweeps, stale_customers
from etl_assets.core.tables import target_tables
from etl_assets.leads import cold_sweep
from etl_assets.ledger.locks import stripe_of
from etl_assets.services import batch
from etl_assets.testing.raw_data import SAMPLE_SHOP, RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.interleaving import Matches, WorkerDied, interleaved, writes_to

DAY, OTHER_DAY, NEW_DAY = date(2026, 1, 5), date(2026, 1, 3), date(2026, 6, 1)
TABLES = target_tables("public")
CUSTOMERS, LEADS = TABLES.customers, TABLES.leads
TABLE_OF = {"customers": "public.customers", "leads": "public.business_leads"}
NAMES = [f"客户{number}" for number in range(8)]


@pytest.fixture(autouse=True)
def _small_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "CUSTOMERS_PER_BITE", 2)
    monkeypatch.setattr(cold_sweep, "LEADS_PER_BITE", 2)


def test_a_bite_holds_a_tenth_of_the_lock_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """急雨里一个运行上万个客户：一口锁完，不相干的一个客户几乎总要等它。"""
    monkeypatch.undo()
    assert {count: batch.bite_of(count) for count in (1, 10_000, 150_000, 10**6)} == {
        1: 2_000,
        10_000: 2_000,
        150_000: 15_000,
        10**6: 20_000,
    }


def at(day: int, *, month: int = 1) -> datetime:
    return datetime(2026, month, day, 4, tzinfo=UTC)


def bring(chain: Chain, raw_data: RawData, *rows: dict[str, Any], hour: int) -> UUID:
    """一次导入完成，它的事件也到了。"""
    import_id = raw_data.add_import(rows, completed_at=datetime(2026, 6, 1, hour, tzinfo=UTC))
    chain.announce(import_id)
    return import_id


def bring_all(chain: Chain, raw_data: RawData, *, hour: int, **values: Any) -> None:
    """每个客户在 DAY 一单。"""
    bring(
        chain,
        raw_data,
        *[{"order_id": name, "customer_name": name, "order_status": "new"} | values for name in NAMES],
        hour=hour,
    )


def nth(number: int, matches: Matches) -> Matches:
    """第 number 条（从 1 起）这样的语句。"""
    seen = 0

    def is_nth(statement: str) -> bool:
        nonlocal seen
        seen += matches(statement)
        return seen == number

    return is_nth


def is_judging(statement: str) -> bool:
    """清扫改判一口商机。"""
    return "WITH wrong AS" in statement


def by_stripe(chain: Chain) -> list[str]:
    """客户的名字，按他们占的锁排好：口就是这样切的。"""
    keys = sa.cast([f"{SAMPLE_SHOP}:{name}" for name in NAMES], sa.ARRAY(sa.Text))
    key = sa.func.unnest(keys).column_valued("key")
    return [name.partition(":")[2] for (name,) in chain.rows(sa.select(key).order_by(stripe_of(key), key))]


# ---- 客户与商机 ------------------------------------------------------------------


@pytest.mark.parametrize("asset", ["customers", "leads"])
def test_small_run_commits_while_a_big_one_is_in_a_bite(chain: Chain, raw_data: RawData, asset: str) -> None:
    """小运行的客户也在大运行手里，只是还没轮到。"""
    bring_all(chain, raw_data, hour=1)
    chain.run_due()
    last = by_stripe(chain)[-1]
    bring(chain, raw_data, {"order_id": "B", "customer_name": last, "ordered_at": at(3), "order_status": "new"}, hour=2)
    chain.run(OTHER_DAY, assets=["orders", "customers"])
    with interleaved(chain.engine, before=writes_to(TABLE_OF[asset])) as both:
        assert both.begin(lambda: chain.run(DAY, assets=[asset]))
        small = both.meanwhile(lambda: chain.run(OTHER_DAY, assets=[asset]))
        assert small.done()
        small.result()
        both.resume()
    chain.run_due()
    chain.run(DAY)
    chain.assert_converged()


@pytest.mark.parametrize("asset", ["customers", "leads"])
def test_run_killed_between_bites_keeps_what_is_done_and_is_done_again(
    chain: Chain, raw_data: RawData, asset: str
) -> None:
    bring_all(chain, raw_data, hour=1)
    chain.run_due()
    bring_all(chain, raw_data, hour=2, amount="7.00", customer_name="张三")
    bring_all(chain, raw_data, hour=3, amount="8.00")
    chain.run(DAY, assets=["orders"] if asset == "customers" else ["orders", "customers"])
    with interleaved(chain.engine, before=nth(3, writes_to(TABLE_OF[asset], how="INSERT INTO"))) as both:
        assert both.begin(lambda: chain.run(DAY, assets=[asset]))
        with pytest.raises(WorkerDied):
            both.resume(dies=True)
    table = CUSTOMERS if asset == "customers" else LEADS
    amounts = [amount for (amount,) in chain.rows(sa.select(table.c.bulk_amount).order_by(table.c.bulk_amount))]
    assert [str(amount) for amount in amounts].count("8.00") == 4
    assert chain.due_days(asset) == [DAY]
    chain.run_due()
    chain.assert_converged()


def test_marks_are_consumed_with_the_bite_that_repairs(chain: Chain, raw_data: RawData) -> None:
    """订单都换了客户，旧客户只有标记记得；死在半途，做完的消掉了，没做的还在。"""
    bring_all(chain, raw_data, hour=1)
    chain.run_due()
    bring_all(chain, raw_data, hour=2, customer_name="张三")
    chain.run(DAY, assets=["orders"])
    marks = sa.select(sa.func.count()).where(stale_customers.c.asset == "customers")
    assert chain.rows(marks) == [(8,)]
    with interleaved(
        chain.engine, before=nth(3, lambda statement: "DELETE FROM etl.stale_customers" in statement)
    ) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["customers"]))
        with pytest.raises(WorkerDied):
            both.resume(dies=True)
    ((left,),) = chain.rows(marks)
    assert 4 <= left <= 5  # 两口里或许有一个是张三，他没有标记
    chain.run_due()
    chain.assert_converged()
    assert chain.rows(marks) == [(0,)]


def test_change_after_its_bite_is_done_by_the_next_run(chain: Chain, raw_data: RawData) -> None:
    """大运行正在第三口；做过了的客户的订单变了。"""
    bring_all(chain, raw_data, hour=1)
    chain.run(DAY, assets=["orders"])
    first = by_stripe(chain)[0]
    with interleaved(chain.engine, before=nth(3, writes_to("public.customers", how="INSERT INTO"))) as both:
        assert both.begin(lambda: chain.run(DAY, assets=["customers"]))
        bring(chain, raw_data, {"order_id": first, "customer_name": first, "amount": "9.00"}, hour=2)
        both.meanwhile(lambda: chain.run(DAY, assets=["orders"])).result(timeout=30)
        both.resume()
    assert chain.due_days("customers") == [DAY]
    chain.run_due()
    chain.assert_converged()


def test_one_bite_is_one_transaction(chain: Chain, raw_data: RawData) -> None:
    commits: list[str] = []
    bring(chain, raw_data, *[{"order_id": name, "customer_name": name} for name in NAMES[:2]], hour=1)
    chain.run(DAY, assets=["orders"])
    chain.execute(sa.insert(cold_sweeps).values(target="public", last_warm_day=date(2025, 10, 7), rollout="100"))
    sa.event.listen(chain.engine, "commit", lambda _connection: commits.append("commit"))
    chain.run(DAY, assets=["customers", "leads"])
    assert len(commits) == 2
    chain.assert_converged()


# ---- COLD 清扫 -------------------------------------------------------------------


@pytest.fixture
def grown_cold(chain: Chain, raw_data: RawData) -> Chain:
    """八个商机该变冷了：新的一天的订单与客户都好了，leads 还没有做。"""
    bring_all(chain, raw_data, hour=1)
    bring(
        chain, raw_data, {"order_id": "B", "customer_name": "李四", "ordered_at": at(3), "order_status": "new"}, hour=2
    )
    chain.run_due()
    bring(
        chain,
        raw_data,
        {"order_id": "N", "customer_name": "王五", "ordered_at": at(1, month=6), "order_status": "new"},
        hour=3,
    )
    chain.run(NEW_DAY, assets=["orders", "customers"])
    return chain


def cold(chain: Chain) -> int:
    return len(chain.rows(sa.select(LEADS.c.lead_id).where(LEADS.c.current_stage == "COLD")))


def test_other_runs_are_done_while_leads_are_judged(grown_cold: Chain, raw_data: RawData) -> None:
    """清扫正在第三口；另一天的运行写下的已按新的一天判，它不必等清扫完，也不替它扫。"""
    chain = grown_cold
    bring(
        chain, raw_data, {"order_id": "C", "customer_name": "钱七", "ordered_at": at(8), "order_status": "new"}, hour=4
    )
    with interleaved(chain.engine, before=nth(3, is_judging)) as both:
        assert both.begin(lambda: chain.run(NEW_DAY, assets=["leads"]))
        assert cold(chain) == 4
        small = both.meanwhile(lambda: chain.run(date(2026, 1, 8)))
        assert small.done()
        small.result()
        assert cold(chain) == 5
        assert chain.due_days() == [NEW_DAY]
        both.resume()
    assert cold(chain) == 10
    assert chain.due_days() == []
    chain.assert_converged()


@pytest.mark.parametrize("is_due", [True, False], ids=["due", "asked for by hand"])
def test_sweep_that_dies_is_finished_by_whoever_makes_its_day(grown_cold: Chain, *, is_due: bool) -> None:
    chain = grown_cold
    day = NEW_DAY if is_due else DAY
    with interleaved(chain.engine, before=nth(3, is_judging)) as both:
        assert both.begin(lambda: chain.run(day, assets=["leads"]))
        with pytest.raises(WorkerDied):
            both.resume(dies=True)
    assert 0 < cold(chain) < 9
    chain.run(OTHER_DAY, assets=["leads"])
    if not is_due:
        chain.run(NEW_DAY, assets=["leads"])
    assert 0 < cold(chain) < 9
    assert chain.due_days("leads") == [day]
    chain.run_due()
    chain.assert_converged()


def test_day_that_moves_again_during_a_sweep_is_owed_by_who_moved_it(grown_cold: Chain, raw_data: RawData) -> None:
    """清扫正在第三口，最新的业务日又换了：都按更新的那天判完。"""
    chain = grown_cold
    newer = date(2026, 9, 1)
    bring(
        chain,
        raw_data,
        {"order_id": "M", "customer_name": "赵六", "ordered_at": at(1, month=9), "order_status": "new"},
        hour=5,
    )
    chain.run(newer, assets=["orders", "customers"])
    chain.execute(sa.update(TABLES.orders).where(TABLES.orders.c.order_id == "M").values(order_date=NEW_DAY))
    with interleaved(chain.engine, before=nth(3, is_judging)) as both:
        assert both.begin(lambda: chain.run(NEW_DAY, assets=["leads"]))
        chain.execute(sa.update(TABLES.orders).where(TABLES.orders.c.order_id == "M").values(order_date=newer))
        assert not both.meanwhile(lambda: chain.run(newer, assets=["leads"])).done()
        both.resume()
    chain.run_due()
    assert cold(chain) == 10
    chain.assert_converged()


def test_person_who_holds_a_lead_does_not_keep_others_from_the_new_day(grown_cold: Chain, raw_data: RawData) -> None:
    """有人正改着一个该变冷的商机：清扫等他，别的运行不等清扫。"""
    chain = grown_cold
    bring(
        chain, raw_data, {"order_id": "C", "customer_name": "李四", "ordered_at": at(8), "order_status": "new"}, hour=4
    )
    lead = sa.select(LEADS.c.lead_id).where(LEADS.c.last_order_at == at(5)).limit(1).scalar_subquery()
    with interleaved(chain.engine, before=nth(3, is_judging)) as both, chain.engine.connect() as person:
        person.execute(sa.update(LEADS).where(LEADS.c.lead_id == lead).values(owner="王五"))
        assert both.begin(lambda: chain.run(NEW_DAY, assets=["leads"]))
        small = both.meanwhile(lambda: chain.run(date(2026, 1, 8)))
        assert small.done()
        small.result()
        both.release()
        small = both.meanwhile(lambda: chain.run(date(2026, 1, 8)))
        small.result(timeout=30)
        person.commit()
        both.resume()
    chain.run_due()
    assert cold(chain) == 9
    chain.assert_converged()
