"""活与变了的成比例：历史再长、那一天再大，一个事件的每条语句读的行也只是它点名的订单与那几个客户的。"""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
import sqlalchemy as sa

from benchmarks.history import History, fill_history
from etl_assets.core.tables import target_tables
from etl_assets.leads.events import LeadChanged
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.plans import ExplainedStatement, explained

HISTORY = History(date(2026, 4, 10), days=100, imports=10_000, orders=20_000, customers=5_000)
NUMBER = 8_007
MOST_ROWS = 10
"""一个客户有四个订单。一天 200 个订单，它们的客户共 800 个；表都有几百行以上。"""
TABLES = (
    *("import_tasks", "raw_orders", "orders", "customers", "business_leads"),
    *("import_requests", "import_events", "ledger", "order_index", "day_accounts", "counted_imports"),
)
CUSTOMERS, LEADS = target_tables("public").customers, target_tables("public").leads


@pytest.fixture
def history(chain: Chain, raw_data: RawData) -> Chain:  # noqa: ARG001  # 店铺与类型
    """都做完了的一段历史。"""
    fill_history(chain.engine, chain.settings, HISTORY)
    chain.reports.clear()
    return chain


@pytest.mark.parametrize("change", ["new order", "new version"])
def test_event_reads_its_orders_and_customers_and_no_day_as_a_whole(
    history: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    row = {"customer_name": HISTORY.customer_of(NUMBER), "ordered_at": datetime(2026, 2, 10, 4, tzinfo=UTC)}
    order_id = "N-1" if change == "new order" else f"H-{NUMBER}"
    import_id = raw_data.add_import([{"order_id": order_id, **row}], completed_at=datetime(2026, 6, 1, tzinfo=UTC))
    with explained(history.engine, monkeypatch) as statements:
        assert HISTORY.day_of(NUMBER) in history.announce(import_id)
        history.run_due()
    assert len(statements) > 30
    assert_proportional(statements)


@pytest.mark.parametrize("kind", ["lead_ids", "customer_global_ids"])
def test_changed_lead_reads_its_customer_and_no_day_as_a_whole(
    history: Chain, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    owner = sa.select(CUSTOMERS.c.customer_global_id).where(
        CUSTOMERS.c.customer_nickname == HISTORY.customer_of(NUMBER)
    )
    of_customer = sa.and_(LEADS.c.customer_global_id.in_(owner), LEADS.c.lead_no == 1)
    ((lead_id, customer_id),) = history.rows(sa.select(LEADS.c.lead_id, LEADS.c.customer_global_id).where(of_customer))
    closing = {"closed_by": "user", "closed_at": datetime(2026, 1, 1, tzinfo=UTC), "current_stage": "LOST"}
    history.execute(sa.update(LEADS).where(LEADS.c.lead_id == lead_id).values(**closing))
    event = LeadChanged.model_validate({kind: [lead_id if kind == "lead_ids" else customer_id]})
    with explained(history.engine, monkeypatch) as statements:
        assert history.tell(event)[0].days
        history.run_due()
    assert [(report.asset, report.scope) for report in history.reports] == [("leads", "changed")]
    assert len(statements) > 10
    assert_proportional(statements)


def assert_proportional(statements: list[ExplainedStatement]) -> None:
    for table in TABLES:
        most = max(statements, key=lambda statement: statement.rows_read(table))
        assert most.rows_read(table) <= MOST_ROWS, f"{most.rows_read(table)} rows of {table} for {most.text}"
