"""人在应用里关闭、收回一个商机，说一声：真的栈把他的订单重新分到商机，网页上看得见那个运行。"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from bridge.demo.reference import find_differences
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from tests.acceptance.conftest import Etl, Query
from tests.acceptance.test_main_flow import import_and_wait, write_csv

CUSTOMER = "关商机的客户"
LEADS, CUSTOMERS = target_tables("public").leads, target_tables("public").customers
OF_CUSTOMER = LEADS.c.customer_global_id.in_(
    sa.select(CUSTOMERS.c.customer_global_id).where(CUSTOMERS.c.customer_nickname == CUSTOMER)
)
RUNS = """{ runsOrError(filter: {tags: [{key: "dagster/dayline/trigger", value: "event"}, {key: "dagster/partition", value: "2025-05-09"}]}) {
    ... on Runs { results { status assetSelection { path } } } } }"""


def orders_of_leads(engine: sa.Engine) -> list[tuple[int, int]]:
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(LEADS.c.lead_no, LEADS.c.bulk_count).where(OF_CUSTOMER).order_by(LEADS.c.lead_no)
        )
        return [(row.lead_no, row.bulk_count) for row in rows]


def change(engine: sa.Engine, **values: Any) -> tuple[UUID, UUID]:
    """人改头一个商机；返回它与它的客户。"""
    first = (
        sa.update(LEADS)
        .where(OF_CUSTOMER, LEADS.c.lead_no == 1)
        .values(**values)
        .returning(LEADS.c.lead_id, LEADS.c.customer_global_id)
    )
    with engine.begin() as connection:
        lead_id, customer_id = connection.execute(first).one()
    return lead_id, customer_id


def eventually(engine: sa.Engine, dealt: list[tuple[int, int]]) -> None:
    deadline = time.monotonic() + 90
    while (found := orders_of_leads(engine)) != dealt:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_changed_lead_is_dealt_again_once_it_is_told_of(
    etl: Etl, query: Query, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    orders = [
        (f"CL-{day}", "关商机店", CUSTOMER, "大货订单", "待发货", "5", "1", f"2025-05-0{day} 12:00:00")
        for day in (7, 8, 9)
    ]
    import_and_wait(etl, str(write_csv(tmp_path / "leads.csv", orders)), "--create-shops")
    assert orders_of_leads(stack_engine) == [(1, 3)]

    closed_at = datetime(2025, 5, 7, 12, tzinfo=UTC)
    lead_id, customer_id = change(stack_engine, closed_by="user", closed_at=closed_at, current_stage="LOST")
    etl("publish", "events.lead.changed", json.dumps({"lead_ids": ["00000000-0000-4000-8000-00000000dead"]}))
    etl("publish", "events.lead.changed", json.dumps({"status": "closed", "lead_ids": [str(lead_id)]}))
    eventually(stack_engine, [(1, 1), (2, 2)])
    assert find_differences(stack_engine, stack_settings) == []

    change(stack_engine, closed_by=None, closed_at=None, current_stage="OPEN")
    etl("publish", "events.lead.changed", json.dumps({"status": "reopened", "customer_global_ids": [str(customer_id)]}))
    eventually(stack_engine, [(1, 3)])
    assert find_differences(stack_engine, stack_settings) == []

    runs = query(RUNS)["runsOrError"]["results"]
    of_leads = [run["status"] for run in runs if run["assetSelection"] == [{"path": ["leads"]}]]
    assert len(of_leads) == 2
    # 数据提交之后，运行才收场
    assert set(of_leads) <= {"SUCCESS", "STARTED"}
    refused = etl("publish", "events.lead.changed", "{}", exit_code=2)
    assert "exactly one of customer_global_ids and lead_ids must be given" in refused.stderr
