"""表的检查：对的表全过，改坏哪里哪项不过；还没轮到重算的客户不算错。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

import pytest
import sqlalchemy as sa

from etl_assets.core.asset_folders import checks_of, descriptions
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.customers.asset import customers
from etl_assets.customers.etl import materialize_customers
from etl_assets.leads.asset import leads
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.asset import orders
from etl_assets.services.materialization import RunContext
from etl_assets.services.table_checks import count_violations
from etl_assets.testing.fixtures import MaterializeDays
from etl_assets.testing.raw_data import RawData

DAY = date(2026, 1, 5)
OF_DAY = DayRange(DAY, DAY)
OTHER = DayRange(date(2026, 1, 6), date(2026, 1, 6))


@pytest.fixture
def tables(raw_data: RawData, materialize_days: MaterializeDays, engine: sa.Engine) -> sa.Engine:
    """两个客户的三个订单，一个已取消。"""
    raw_data.add_import(
        [
            {},
            {"order_id": "B", "order_status": "已取消"},
            {"order_id": "C", "customer_name": "李四", "order_type": "打样订单"},
        ]
    )
    assert materialize_days([orders, customers, leads], DAY).success
    return engine


def violations(engine: sa.Engine, settings: EtlSettings, days: DayRange | None = None) -> Mapping[str, int]:
    """不过的检查 → 行数。"""
    found = {
        f"{asset}.{name}": rows
        for asset in descriptions()
        for name, rows in count_violations(engine, settings, asset, days).items()
    }
    return {name: rows for name, rows in found.items() if rows}


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("days", [None, OF_DAY, OTHER])
def test_right_tables_pass_every_check(tables: sa.Engine, etl_settings: EtlSettings, days: DayRange | None) -> None:
    assert violations(tables, etl_settings, days) == {}
    assert {asset: set(count_violations(tables, etl_settings, asset, days)) for asset in descriptions()} == {
        asset: set(checks_of(asset)) for asset in descriptions()
    }


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE orders SET quantity = -1 WHERE order_id = 'B'", {"orders.non_negative": 1}),
        (
            "UPDATE orders SET import_id = gen_random_uuid() WHERE order_id = 'C'",
            {"orders.references": 1, "orders.accounts": 1},
        ),
        (
            "UPDATE customers SET total_amount = total_amount + 0.01 WHERE customer_nickname = '张三'",
            {"customers.totals": 1},
        ),
        ("UPDATE customers SET order_count = 7 WHERE customer_nickname = '李四'", {"customers.totals": 1}),
        (
            "UPDATE customers SET order_count = -1 WHERE customer_nickname = '李四'",
            {"customers.totals": 1, "customers.non_negative": 1},
        ),
        ("DELETE FROM customers WHERE customer_nickname = '李四'", {"customers.references": 1, "leads.references": 1}),
        ("UPDATE business_leads SET sample_count = 2 WHERE sample_count = 1", {"leads.totals": 1}),
        ("DELETE FROM business_leads WHERE sample_count = 1", {"leads.totals": 1}),
    ],
)
def test_each_damage_is_found_by_its_check(
    tables: sa.Engine, etl_settings: EtlSettings, damage: str, found: Mapping[str, int]
) -> None:
    execute(tables, damage)
    assert violations(tables, etl_settings) == found
    assert violations(tables, etl_settings, OTHER) == {}


@pytest.mark.parametrize("days", [None, OF_DAY])
def test_statuses_are_compared_as_the_etl_compares_them(
    raw_data: RawData,
    materialize_days: MaterializeDays,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    days: DayRange | None,
) -> None:
    """casefold，不是 lower()；别的 ETL 写的状态可以是 NULL，或没修剪。"""
    listed = etl_settings.model_copy(update={"cancelled_statuses": ("épuisé", "gross", "τελοσ", "void")})
    names = ["ÉPUISÉ", "GROẞ", "groß", "ΤΕΛΟΣ", "VOID", "Épuise", "missing", "untrimmed"]
    raw_data.add_import([{"order_id": name, "order_status": name} for name in names])
    run = RunContext(run_id="run", assets=frozenset(["customers", "leads"]))
    assert materialize_days([orders], DAY).success
    execute(
        engine,
        "UPDATE orders SET latest_status = NULL WHERE order_id = 'missing'",
        "UPDATE orders SET latest_status = ' Void\u3000' WHERE order_id = 'untrimmed'",
    )
    materialize_customers(engine, listed, OF_DAY, run)
    materialize_leads(engine, listed, OF_DAY, run)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT order_count FROM customers").scalar() == 2
    assert violations(engine, listed, days) == {}
    execute(engine, "UPDATE customers SET order_count = 3")
    assert violations(engine, listed, days) == {"customers.totals": 1}


def test_figures_that_are_missing_are_wrong(tables: sa.Engine, etl_settings: EtlSettings) -> None:
    execute(tables, "UPDATE customers SET total_amount = NULL, sample_count = NULL WHERE customer_nickname = '李四'")
    assert violations(tables, etl_settings) == {"customers.totals": 1, "leads.totals": 1}


def test_leads_without_a_number_are_a_persons(tables: sa.Engine, etl_settings: EtlSettings) -> None:
    insert = (
        "INSERT INTO business_leads (lead_id, customer_global_id, bulk_count, sample_count) "
        "SELECT gen_random_uuid(), customer_global_id, 7, -1 FROM customers"
    )
    execute(tables, insert, insert)
    assert violations(tables, etl_settings) == {}


def test_keys_that_are_there_twice_are_found(tables: sa.Engine, etl_settings: EtlSettings) -> None:
    execute(
        tables,
        "ALTER TABLE orders DROP CONSTRAINT orders_pkey",
        "INSERT INTO orders SELECT * FROM orders WHERE order_id = 'B'",
        "ALTER TABLE business_leads DROP CONSTRAINT business_leads_pkey",
        "ALTER TABLE business_leads DROP CONSTRAINT business_leads_customer_global_id_lead_no_key",
        "INSERT INTO business_leads SELECT * FROM business_leads WHERE sample_count = 1",
    )
    assert violations(tables, etl_settings, OF_DAY) == {
        "orders.unique_keys": 1,
        "orders.accounts": 1,
        "leads.unique_keys": 1,
        "leads.totals": 1,
    }


def test_customers_that_are_still_due_are_not_wrong(
    tables: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, materialize_days: MaterializeDays
) -> None:
    """订单先变了，客户与商机欠着：不算错；轮到之后照查。"""
    raw_data.add_import([{"order_id": "D"}])
    assert materialize_days([orders], DAY).success
    assert violations(tables, etl_settings) == {}
    assert materialize_days([customers, leads], DAY).success
    execute(tables, "UPDATE customers SET order_count = 9 WHERE customer_nickname = '张三'")
    assert violations(tables, etl_settings) == {"customers.totals": 1}
