"""customers 与 leads 的运行在一段长的历史上：读的只是手头的客户，与表有多大无关。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine
from etl_assets.core.etl_tables import order_index, stale_customers
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.services import table_checks
from etl_assets.services.table_checks import count_violations
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import SAMPLE_SHOP, RawData
from tests.integration.engine.chain import Chain, cloned_chain
from tests.integration.engine.plans import ExplainedStatement, explained

TABLES = target_tables("public")
CUSTOMERS, LEADS = TABLES.customers, TABLES.leads
DAY = date(2026, 1, 5)
LARGE = ("orders", "order_index", "customers", "business_leads")

# 一个客户一单、一个商机，一天二十个；最新的一天是 2026-01-04，更早的多半已经 COLD
_SEED = """
    CREATE TEMPORARY TABLE history AS
    SELECT n, '00000000-0000-4000-8000-000000000001'::uuid AS shop_id, 'H-' || n AS order_id, '客户' || n AS nickname,
           md5('customer ' || n)::uuid AS customer_id, date '2026-01-04' - n / 20 AS day, n % 3 = 0 AS is_won
    FROM generate_series(0, 19999) n;
    INSERT INTO public.orders (shop_id, order_id, customer_nickname, latest_status, system_order_type, amount, quantity,
                               ordered_at, order_date, raw_id)
    SELECT shop_id, order_id, nickname, CASE WHEN is_won THEN 'completed' ELSE 'new' END, 'BULK', 1, 1, day + time '04:00', day, 0
    FROM history;
    INSERT INTO etl.order_index (target, shop_id, order_id, customer_nickname, customer_key, order_date)
    SELECT 'public', shop_id, order_id, nickname, shop_id || ':' || nickname, day FROM history;
    INSERT INTO public.customers (customer_global_id, customer_key, shop_id, customer_nickname, first_order_at, last_order_at,
                                  order_count, total_amount, sample_count, proof_count, bulk_count,
                                  sample_amount, proof_amount, bulk_amount)
    SELECT customer_id, shop_id || ':' || nickname, shop_id, nickname, day + time '04:00', day + time '04:00', 1, 1, 0, 0, 1, 0, 0, 1
    FROM history;
    INSERT INTO public.business_leads (lead_id, customer_global_id, lead_no, current_stage, opened_at, last_order_at,
                                       closed_at, closed_by, sample_count, proof_count, bulk_count,
                                       sample_amount, proof_amount, bulk_amount)
    SELECT md5('lead ' || n)::uuid, customer_id, 1,
           CASE WHEN is_won THEN 'WON' WHEN day < date '2026-01-04' - 90 THEN 'COLD' ELSE 'OPEN' END,
           day + time '04:00', day + time '04:00', CASE WHEN is_won THEN day + time '04:00' END, CASE WHEN is_won THEN 'etl' END,
           0, 0, 1, 0, 0, 1
    FROM history;
    INSERT INTO etl.cold_sweeps VALUES ('public', date '2026-01-04' - 90, '100');
    DROP TABLE history;
    ANALYZE
"""


@pytest.fixture(scope="module")
def history(postgres_url: str, database_template: str) -> Iterator[str]:
    """模板数据库的名字：这么多行，不放进大家共用的那个。"""
    with cloned_database(postgres_url, database_template) as url:
        engine = build_engine(EtlSettings(database_url=url))
        with engine.begin() as connection:
            connection.execute(sa.text(_SEED))
        engine.dispose()
        yield engine.url.database or ""


@pytest.fixture
def chain(postgres_url: str, history: str) -> Iterator[Chain]:
    """已有一段历史的资产链。"""
    with cloned_chain(postgres_url, history) as chain:
        yield chain


def at(day: int, *, month: int = 1) -> datetime:
    return datetime(2026, month, day, 4, tzinfo=UTC)


def read_at_most(statements: Sequence[ExplainedStatement], rows: int, tables: Sequence[str] = LARGE) -> None:
    """哪条语句从大表里读多了，就说是哪条。"""
    assert statements
    for table in tables:
        most = max(statements, key=lambda statement: statement.rows_read(table))
        assert most.rows_read(table) <= rows, f"{most.rows_read(table)} rows of {table} for {most.text}\n{most.plan}"


def test_run_reads_only_the_customers_at_hand(chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_data.add_import(
        [{"customer_name": "客户30000", "order_status": "new"}, {"order_id": "B", "customer_name": "客户7"}]
    )
    chain.run(DAY)  # 最新的业务日前移，清扫在这里
    with explained(chain.engine, monkeypatch) as statements:
        chain.run(DAY)
    read_at_most(statements, 10)


def test_sweep_reads_only_the_leads_that_turn_cold(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """最新的业务日从 4 日到 5 日：变冷的是那一天的二十个，其中三分之一已经赢了。"""
    raw_data.add_import([{"customer_name": "新客户"}])
    chain.run(DAY, assets=["orders", "customers"])
    with explained(chain.engine, monkeypatch) as statements:
        (report,) = chain.run(DAY, assets=["leads"])
    assert report.written.updated == 13
    read_at_most(statements, 2 * 13, ["business_leads"])


def test_sweep_of_a_share_looks_only_for_the_customers_of_these_leads(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{"customer_name": "新客户"}])
    chain.run(DAY, assets=["orders", "customers"])
    half = Chain(chain.engine, chain.settings.model_copy(update={"rollout": 50}))
    with explained(chain.engine, monkeypatch) as statements:
        half.run(DAY, assets=["leads"])
    turned = chain.rows(
        sa.select(LEADS.c.lead_id).where(LEADS.c.current_stage == "COLD", LEADS.c.updated_at > LEADS.c.created_at)
    )
    assert 0 < len(turned) < 13
    read_at_most(statements, 2 * 13, ["business_leads", "customers"])


def test_sweep_back_reads_only_the_leads_that_turn_warm(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.execute(sa.text("UPDATE etl.cold_sweeps SET last_warm_day = date '2026-01-04' - 60"))
    chain.execute(
        sa.text(
            "UPDATE business_leads SET current_stage = 'COLD' WHERE closed_at IS NULL AND last_order_at < '2025-11-05'"
        )
    )
    with explained(chain.engine, monkeypatch) as statements:
        (report,) = chain.run(DAY, assets=["leads"])
    assert report.written.updated == 400
    read_at_most(statements, 2 * 400, ["business_leads"])


def test_customers_kept_by_a_person_are_computed_once(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """两千个客户的订单都走了，商机有人写了字：算过一次，就不再锁他们、读他们。"""
    kept = LEADS.c.last_order_at < datetime(2023, 7, 15, tzinfo=UTC)
    chain.execute(sa.update(LEADS).where(kept).values(owner="王五"))
    keys = (
        sa.select(CUSTOMERS.c.customer_key)
        .join(LEADS, LEADS.c.customer_global_id == CUSTOMERS.c.customer_global_id)
        .where(kept)
    )
    key = order_index.c.customer_key
    for asset in ("customers", "leads"):
        mark = sa.select(sa.literal("public"), sa.literal(asset), keys.subquery("kept").c.customer_key)
        chain.execute(sa.insert(stale_customers).from_select(["target", "asset", "customer_key"], mark))
    marked = sa.select(stale_customers.c.customer_key).where(stale_customers.c.asset == "leads")
    chain.execute(
        sa.delete(TABLES.orders).where(
            TABLES.orders.c.order_id.in_(sa.select(order_index.c.order_id).where(key.in_(marked)))
        )
    )
    chain.execute(sa.delete(order_index).where(key.in_(marked)))
    raw_data.add_import([{"customer_name": "新客户"}])
    chain.run(DAY)
    assert len(chain.rows(sa.select(LEADS.c.lead_id).where(LEADS.c.last_order_at.is_(None)))) > 1000
    chain.execute(sa.text("ANALYZE"))
    with explained(chain.engine, monkeypatch) as statements:
        chain.run(DAY)
    read_at_most(statements, 10)
    locking = ("FOR UPDATE", "FOR KEY SHARE")
    read_at_most(
        [statement for statement in statements if any(each in statement.text for each in locking)], 1, ["locks"]
    )
    assert not chain.rows(sa.select(stale_customers.c.mark_id))


def test_kept_customer_goes_with_any_run_once_the_person_lets_go(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """找到他，不用看所有留下的。"""
    zeros = {"last_order_at": None, "opened_at": None, "closed_at": None, "closed_by": None, "current_stage": "OPEN"}
    kept = LEADS.c.last_order_at < datetime(2023, 7, 15, tzinfo=UTC)
    of_kept = (
        sa.select(CUSTOMERS.c.customer_key)
        .join(LEADS, LEADS.c.customer_global_id == CUSTOMERS.c.customer_global_id)
        .where(kept)
    )
    chain.execute(sa.delete(order_index).where(order_index.c.customer_key.in_(of_kept)))
    chain.execute(sa.update(LEADS).where(kept).values(**zeros, owner="王五"))
    chain.execute(sa.text("ANALYZE"))
    raw_data.add_import([{"customer_name": "新客户"}])
    chain.run(DAY)
    count = len(chain.rows(sa.select(CUSTOMERS.c.customer_key)))
    (lead_id,), *_ = chain.rows(sa.select(LEADS.c.lead_id).where(LEADS.c.last_order_at.is_(None)))
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_id == lead_id).values(owner=" "))
    with explained(chain.engine, monkeypatch) as statements:
        chain.run(DAY)
    read_at_most(statements, 10)
    assert len(chain.rows(sa.select(CUSTOMERS.c.customer_key))) == count - 1
    assert not chain.rows(sa.select(LEADS.c.lead_id).where(LEADS.c.lead_id == lead_id))


def test_customer_left_with_nothing_is_found_among_those_at_hand(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """customers 看到字还在，leads 看到字没了：再记他一笔，只看手头的客户。"""
    key = f"{SAMPLE_SHOP}:客户5"
    chain.execute(sa.delete(TABLES.orders).where(TABLES.orders.c.order_id == "H-5"))
    chain.execute(sa.delete(order_index).where(order_index.c.order_id == "H-5"))
    chain.execute(sa.insert(stale_customers).values(target="public", asset="leads", customer_key=key))
    with explained(chain.engine, monkeypatch) as statements:
        chain.run(DAY, assets=["leads"])
    read_at_most([statement for statement in statements if "INSERT INTO etl.stale_customers" in statement.text], 1)
    assert chain.rows(sa.select(stale_customers.c.customer_key.distinct())) == [(key,)]


def test_giant_customer_costs_no_more_per_order(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """同一个客户已有两万单，再来一百单：每单碰的页与新客户的一样多。"""
    chain.execute(sa.update(order_index).values(customer_key=f"{SAMPLE_SHOP}:客户1"))
    pages: list[int] = []
    for name, nickname in (("few", "新客户"), ("many", "客户1")):
        rows: list[dict[str, Any]] = [{"order_id": f"{name}-{n}", "customer_name": nickname} for n in range(100)]
        raw_data.add_import(rows)
        with explained(chain.engine, monkeypatch) as statements:
            chain.run(DAY, assets=["orders"])
        pages.append(
            sum(statement.pages for statement in statements if "INSERT INTO etl.order_index" in statement.text)
        )
    few, many = pages
    assert many < 2 * few


@pytest.mark.parametrize("asset", ["customers", "leads"])
def test_whole_check_looks_at_a_bite_of_the_customers_at_a_time(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, asset: str
) -> None:
    """也没有一条是 NOT IN：几百万个客户的散列装不下，就成了一行一行地比。"""
    monkeypatch.setattr(table_checks, "ORDERS_PER_BITE", 500)
    wrong = CUSTOMERS.c.customer_nickname.in_(["客户1", "客户20", "客户300"])
    chain.execute(sa.update(CUSTOMERS).where(wrong).values(order_count=7, bulk_count=7))
    with explained(chain.engine, monkeypatch) as statements:
        found = count_violations(chain.engine, chain.settings, asset, None)
    assert {name: rows for name, rows in found.items() if rows} == {"totals": 3}
    read_at_most(statements, 10_000, ["order_index"])
    assert [statement.text for statement in statements if statement.asks_for_each_row] == []
