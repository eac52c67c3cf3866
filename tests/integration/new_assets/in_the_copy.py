"""在多了 products 与 daily_report 两个文件夹的那份代码里跑，见 test_new_asset_folders.py。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from dagster import AssetKey

from etl_assets.core.asset_folders import asset_folders, descriptions
from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import TableContractError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.definitions import defs
from etl_assets.products.etl import transform
from etl_assets.services.previews import read_previews
from etl_assets.services.table_checks import count_violations
from etl_assets.services.table_contract import assert_table_contract
from etl_assets.services.target_schema import prepare_target

DAY, NEXT_DAY = date(2026, 1, 5), date(2026, 1, 6)
PUBLIC = target_tables("public")
Etl = Callable[..., str]


@pytest.fixture
def etl(etl_settings: EtlSettings, tmp_path: Path) -> Etl:
    """`etl("show", "products")`：命令说的话。"""

    def run(*arguments: str, exit_code: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
        addresses = {
            "ETL_DATABASE_URL": etl_settings.database_url,
            "ETL_NATS_URL": "nats://127.0.0.1:1",
            "ETL_STATE_DIR": str(tmp_path),
        }
        command = [sys.executable, "-m", "bridge.cli.main", *arguments]
        result = subprocess.run(
            command,
            env={**environment, **addresses, "ETL_CONNECT_TIMEOUT_SECONDS": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == exit_code, result.stdout + result.stderr
        return result.stdout or result.stderr

    return run


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Engine:
    """两天的合计与日报；第二天有两种订单。"""
    products = [
        {"day": DAY, "system_order_type": "BULK", "order_count": 2, "amount": "20.00"},
        {"day": NEXT_DAY, "system_order_type": "BULK", "order_count": 1, "amount": "5.00"},
        {"day": NEXT_DAY, "system_order_type": "SAMPLE", "order_count": 3, "amount": "0.30"},
    ]
    report = [{"day": DAY, "customer_count": 1, "order_count": 2, "amount": "20.00"}]
    with engine.begin() as connection:
        connection.execute(sa.insert(PUBLIC.products), products)
        connection.execute(sa.insert(PUBLIC.daily_report), report)
    return engine


def test_they_come_after_what_they_are_computed_from() -> None:
    assert asset_folders() == ["customers", "daily_report", "leads", "orders", "products"]
    assert list(descriptions()) == ["orders", "customers", "products", "daily_report", "leads"]


def test_dagster_shows_assets_columns_and_where_they_come_from() -> None:
    graph = defs.resolve_asset_graph()
    parents = {
        asset: {key.to_user_string() for key in graph.get(AssetKey(asset)).parent_keys}
        for asset in ("products", "daily_report")
    }
    assert parents == {"products": {"orders"}, "daily_report": {"customers", "products"}}
    metadata = graph.get(AssetKey("daily_report")).metadata
    lineage = metadata["dagster/column_lineage"].value.deps_by_column["order_count"]
    assert [(dep.asset_key.to_user_string(), dep.column_name) for dep in lineage] == [("products", "order_count")]
    assert [column.name for column in metadata["dagster/column_schema"].value.columns][:2] == ["day", "customer_count"]


def test_jobs_take_them_in() -> None:
    etl_job, checks_job = defs.resolve_job_def("etl"), defs.resolve_job_def("table_checks")
    assert {key.to_user_string() for key in etl_job.asset_layer.selected_asset_keys} == set(asset_folders())
    checked = {
        f"{key.asset_key.to_user_string()}.{key.name}" for key in checks_job.asset_layer.asset_graph.asset_check_keys
    }
    assert "products.positive" in checked
    assert "orders.accounts" in checked


def test_init_db_makes_their_tables_beside_those_of_the_application(etl: Etl, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "DROP TABLE products, daily_report; INSERT INTO orders (shop_id, order_id) VALUES (gen_random_uuid(), 'A')"
        )
        with pytest.raises(TableContractError, match=r"public\.products is missing, it must be made by `etl init-db`"):
            assert_table_contract(connection, "public")
    assert "created products and daily_report in schema public" in etl("init-db")
    assert "created" not in etl("init-db")
    with engine.connect() as connection:
        assert_table_contract(connection, "public")
        assert connection.scalar(sa.text("SELECT count(*) FROM orders")) == 1


def test_init_db_leaves_it_to_the_application_to_make_its_own_again(
    engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE customers, products")
    with pytest.raises(TableContractError, match=r"public\.customers is missing, it must be a table"):
        prepare_target(engine, etl_settings)


@pytest.mark.usefixtures("filled")
def test_show_has_their_rows_the_newest_day_first(etl: Etl) -> None:
    assert [row["day"] for row in json.loads(etl("show", "products", "--format", "json"))] == [
        "2026-01-06",
        "2026-01-06",
        "2026-01-05",
    ]
    (row,) = json.loads(etl("show", "products", "--day", "2026-01-05", "--format", "json"))
    assert (row["system_order_type"], row["order_count"], row["amount"]) == ("BULK", 2, "20.00")
    assert "customer_count" in etl("show", "daily_report")
    refused = etl("show", "products", "--customer", "张三", exit_code=1)
    assert refused == "error: products has no customer_nickname: leave --customer out\n"
    assert "--lead goes with" in etl("show", "products", "--lead", "00000000-0000-4000-8000-000000000001", exit_code=2)


def test_backfill_show_and_compare_offer_them(etl: Etl) -> None:
    for command in ("backfill", "show", "compare"):
        assert "orders|customers|products|daily_report|leads" in "".join(etl(command, "--help").split())


def test_compare_finds_their_rows_by_their_key(etl: Etl, filled: sa.Engine, etl_settings: EtlSettings) -> None:
    prepare_target(filled, etl_settings.model_copy(update={"target_schema": "trial"}))
    with filled.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO trial.products SELECT * FROM public.products WHERE system_order_type = 'BULK'"
        )
        connection.exec_driver_sql("UPDATE trial.products SET amount = 21 WHERE day = '2026-01-05'")
    compared = json.loads(etl("compare", "--left", "public", "--right", "trial", "--json", exit_code=1))
    tables: dict[str, dict[str, Any]] = {table["table"]: table for table in compared["tables"]}
    assert list(tables) == list(descriptions())
    products = tables["products"]
    assert (products["rows_left"], products["missing"], products["extra"], products["differing"]) == (3, 1, 0, 1)
    assert products["samples"]["missing"] == [{"day": "2026-01-06", "system_order_type": "SAMPLE"}]
    assert products["samples"]["differing"][0]["column"] == "amount"
    since = etl("compare", "--left", "public", "--right", "trial", "--table", "products", "--since", "2026-01-07")
    assert "are equal" in since or "no rows to compare" in since


def test_checks_look_at_the_days_or_at_the_whole_table(filled: sa.Engine, etl_settings: EtlSettings) -> None:
    with filled.begin() as connection:
        connection.execute(sa.update(PUBLIC.products).where(PUBLIC.products.c.day == NEXT_DAY).values(order_count=0))
    assert count_violations(filled, etl_settings, "products", None) == {"positive": 2}
    assert count_violations(filled, etl_settings, "products", DayRange(DAY, DAY)) == {"positive": 0}
    assert count_violations(filled, etl_settings, "daily_report", None) == {}


def test_previews_show_the_day_and_count_its_types(filled: sa.Engine, etl_settings: EtlSettings) -> None:
    preview = read_previews(filled, etl_settings, "products", DayRange(DAY, NEXT_DAY), "whole")[NEXT_DAY]
    assert [row["order_count"] for row in preview.rows] == [1, 3]
    assert preview.counts == {"BULK": 1, "SAMPLE": 1}
    of_report = read_previews(filled, etl_settings, "daily_report", DayRange(DAY, DAY), "whole")[DAY]
    assert (of_report.total, of_report.counts) == (1, {})


def test_doctor_looks_at_them(etl: Etl, filled: sa.Engine) -> None:
    with filled.begin() as connection:
        connection.execute(sa.update(PUBLIC.products).values(order_count=0))
    found = {finding["check"]: finding for finding in json.loads(etl("doctor", "--json", exit_code=1))}
    assert found["schema"]["state"] == "ok"
    assert found["table checks"]["says"].startswith("products positive (3): ")


def test_transform_needs_no_database() -> None:
    orders = pl.DataFrame(
        {"day": [DAY, DAY, NEXT_DAY], "system_order_type": ["BULK", "BULK", "BULK"], "amount": ["1.50", "2.00", "3.00"]}
    ).with_columns(pl.col("amount").cast(pl.Decimal(14, 2)))
    assert transform(orders).sort("day").rows() == [
        (DAY, "BULK", 2, Decimal("3.50")),
        (NEXT_DAY, "BULK", 1, Decimal("3.00")),
    ]
