"""三个资产经 Dagster 物化：写出的表就是 DOMAIN 说的样子。"""

from __future__ import annotations

from datetime import UTC, date, datetime

from etl_assets.customers.asset import customers
from etl_assets.leads.asset import leads
from etl_assets.orders.asset import orders
from etl_assets.testing.fixtures import MaterializeDays, ReadTable
from etl_assets.testing.raw_data import RawData

DAY = date(2026, 1, 5)


def test_an_order_becomes_a_customer_and_a_won_lead(raw_data: RawData, materialize_days: MaterializeDays, read_table: ReadTable) -> None:
    raw_data.add_import([{}])
    assert materialize_days([orders, customers, leads], DAY).success
    assert read_table("orders")["latest_status"].to_list() == ["completed"]
    customer = read_table("customers").row(0, named=True)
    assert customer["customer_global_id"] == "fa55f60f-e32c-5a53-a54e-925cf73a97da"
    assert (customer["order_count"], str(customer["total_amount"])) == (1, "120.50")
    lead = read_table("business_leads").row(0, named=True)
    assert lead["lead_id"] == "fd4ef8d1-2684-5631-8acd-3c839ea84862"
    assert (lead["current_stage"], lead["closed_by"]) == ("WON", "etl")
    assert lead["closed_at"] == datetime(2026, 1, 5, 4, 0, tzinfo=UTC)
