"""从文件到三张表：真的栈、真的命令、与逐行参照核对。"""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import polars as pl
import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from etl_assets.core.asset_folders import asset_folders
from etl_assets.core.etl_tables import leases
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import order_type_mappings, target_tables
from tests.acceptance.conftest import DATA, Etl, Query

HEADERS = ["order_id", "shop", "customer_name", "order_type", "order_status", "amount", "quantity", "ordered_at"]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample files of ../shared/data are not there")


def write_csv(path: Path, orders: list[tuple[str, ...]]) -> Path:
    pl.DataFrame(orders, schema=HEADERS, orient="row").write_csv(path)
    return path


def import_and_wait(etl: Etl, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(etl("import", *arguments, "--json").stdout)
    etl("wait", "--import-id", report["import_id"], "--timeout", "90")
    return report


def accounting(etl: Etl, import_id: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(etl("imports", "--format", "json", "--limit", "1000").stdout)
    return next(row for row in rows if row["import_id"] == import_id)


@needs_data
@pytest.mark.parametrize(
    ("file", "profile"), [("cdnow_sample.txt", "cdnow"), ("online_retail_sample.csv", "online_retail")]
)
def test_real_file_is_accounted_for_and_equals_the_reference(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, file: str, profile: str
) -> None:
    report = import_and_wait(etl, str(DATA / file), "--profile", profile, "--create-shops")
    row = accounting(etl, report["import_id"])
    assert row["raw"] == report["rows"] == row["loaded"] + row["superseded"] + row["rejected"]
    assert row["waiting"] == 0
    if profile == "cdnow":
        assert (report["rows"], row["loaded"]) == (6919, 6919)
    assert find_differences(stack_engine, stack_settings) == []


def test_same_file_twice_changes_only_import_and_raw_ids(etl: Etl, stack_engine: sa.Engine, tmp_path: Path) -> None:
    orders = [
        (f"T{n}", "重复店", f"客户{n % 7}", "大货订单", "completed", "10.5", "1", f"2026-02-{n % 5 + 1:02} 10:00:00")
        for n in range(40)
    ]
    path = write_csv(tmp_path / "twice.csv", orders)

    def snapshot() -> dict[str, pl.DataFrame]:
        tables = target_tables("public")
        ignored = {"import_id", "raw_id", "created_at", "updated_at"}
        with stack_engine.connect() as connection:
            return {
                table.name: pl.DataFrame(
                    [
                        tuple(map(str, row))
                        for row in connection.execute(
                            sa.select(*[c for c in table.c if c.name not in ignored]).order_by(*table.primary_key)
                        )
                    ],
                    orient="row",
                )
                for table in (tables.orders, tables.customers, tables.leads)
            }

    first = import_and_wait(etl, str(path), "--create-shops")
    before = snapshot()
    second = import_and_wait(etl, str(path), "--again")
    after = snapshot()
    assert before.keys() == after.keys()
    assert all(before[name].equals(after[name]) for name in before)
    with stack_engine.connect() as connection:
        orders_table = target_tables("public").orders
        owners = set(connection.scalars(sa.select(orders_table.c.import_id).where(orders_table.c.order_id.like("T%"))))
    assert owners == {UUID(second["import_id"])}
    assert accounting(etl, first["import_id"])["superseded"] == 40


def test_events_in_reverse_order_and_doubled_give_the_same_tables(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    imports = []
    for version in range(4):
        orders = [
            (
                f"R{n}",
                "乱序店",
                f"客户{(n + version) % 9}",
                "打样订单",
                "paid",
                f"{version}.{n:02}",
                "1",
                f"2026-03-{(n + version) % 9 + 1:02} 09:00:00",
            )
            for n in range(30)
        ]
        path = write_csv(tmp_path / f"v{version}.csv", orders)
        imports.append(json.loads(etl("import", str(path), "--create-shops", "--json").stdout)["import_id"])
    for import_id in [*reversed(imports), *imports]:
        etl("publish", "events.data_import.completed", json.dumps({"status": "completed", "import_id": import_id}))
    for import_id in imports:
        etl("wait", "--import-id", import_id, "--timeout", "90")
    assert find_differences(stack_engine, stack_settings) == []


def test_an_order_of_today_is_in_todays_partition(
    etl: Etl, query: Query, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    now = datetime.now(stack_settings.zone)
    at = max(now - timedelta(minutes=1), now.replace(hour=0, minute=0, second=0))
    path = write_csv(
        tmp_path / "today.csv", [("TODAY-1", "今日店", "今天", "大货订单", "paid", "1", "1", f"{at:%Y-%m-%d %H:%M:%S}")]
    )
    import_and_wait(etl, str(path), "--create-shops")
    rows = json.loads(etl("show", "orders", "--day", f"{at:%Y-%m-%d}", "--format", "json").stdout)
    assert [row["order_id"] for row in rows] == ["TODAY-1"]
    assert f"{at:%Y-%m-%d}" in materialized_partitions(query, "orders")


def test_runs_partitions_and_lineage_are_in_the_dagster_ui(etl: Etl, query: Query, tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "ui.csv", [("UI-1", "界面店", "李四", "打样订单", "paid", "5", "1", "2026-04-04 12:00:00")]
    )
    import_and_wait(etl, str(path), "--create-shops")
    runs = query(
        "{ runsOrError { ... on Runs { results { status jobName tags { key value } assetSelection { path } } } } }"
    )["runsOrError"]["results"]
    ours = [run for run in runs if {"key": "dagster/partition", "value": "2026-04-04"} in run["tags"]]
    assert [(run["status"], run["jobName"]) for run in ours] == [("SUCCESS", "etl")]
    for asset in ("orders", "customers", "leads"):
        assert "2026-04-04" in materialized_partitions(query, asset)
    nodes = query("{ assetNodes { assetKey { path } dependencyKeys { path } } }")["assetNodes"]
    upstream = {node["assetKey"]["path"][0]: {key["path"][0] for key in node["dependencyKeys"]} for node in nodes}
    assert upstream["orders"] == {"raw_orders", "shop_configs", "order_type_mappings"}
    assert upstream["customers"] == {"orders"}
    assert upstream["leads"] == {"customers"}


def test_columns_and_where_they_come_from_are_in_the_dagster_ui(query: Query, stack_engine: sa.Engine) -> None:
    """网页上的列就是数据库里的列；每一列的来源都是一张认得的表里真有的列。"""
    text = """{ assetNodes { assetKey { path } metadataEntries {
        ... on TableSchemaMetadataEntry { schema { columns { name type constraints { nullable } } } }
        ... on TableColumnLineageMetadataEntry { lineage { columnName columnDeps { assetKey { path } columnName } } } } } }"""
    columns: dict[str, set[tuple[str, str, bool]]] = {}
    sources: dict[str, dict[str, set[tuple[str, str]]]] = {}
    for node in query(text)["assetNodes"]:
        (asset,) = node["assetKey"]["path"]
        for entry in node["metadataEntries"]:
            for column in entry.get("schema", {}).get("columns", []):
                columns.setdefault(asset, set()).add(
                    (column["name"], column["type"].replace(", ", ","), column["constraints"]["nullable"])
                )
            for line in entry.get("lineage", []):
                found = {(dep["assetKey"]["path"][0], dep["columnName"]) for dep in line["columnDeps"]}
                sources.setdefault(asset, {})[line["columnName"]] = found

    for asset, table in {"orders": "orders", "customers": "customers", "leads": "business_leads"}.items():
        assert columns[asset] == columns_in_the_database(stack_engine, table)
        assert sources[asset]
        assert sources[asset].keys() <= {name for name, _, _ in columns[asset]}
        for upstream, column in set().union(*sources[asset].values()):
            assert column in {name for name, _, _ in columns[upstream]}
    assert sources["orders"]["amount"] == {("raw_orders", "amount")}
    assert sources["customers"]["total_amount"] == {("orders", "amount"), ("orders", "latest_status")}
    assert ("customers", "customer_key") in sources["leads"]["lead_id"]


def columns_in_the_database(engine: sa.Engine, table: str) -> set[tuple[str, str, bool]]:
    text = sa.text("""SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull FROM pg_attribute
        WHERE attrelid = CAST(:table AS regclass) AND attnum > 0 AND NOT attisdropped""")
    with engine.connect() as connection:
        return {(row[0], row[1], row[2]) for row in connection.execute(text, {"table": table})}


def test_event_of_a_missing_import_waits_and_the_next_one_is_handled(etl: Etl, tmp_path: Path) -> None:
    etl(
        "publish",
        "events.data_import.completed",
        json.dumps({"status": "completed", "import_id": "00000000-0000-4000-8000-00000000dead"}),
    )
    path = write_csv(tmp_path / "next.csv", [("N-1", "下一店", "王五", "", "paid", "5", "1", "2026-05-05 12:00:00")])
    import_and_wait(etl, str(path), "--create-shops")
    missing = etl("wait", "--import-id", "00000000-0000-4000-8000-00000000dead", "--timeout", "0.2", exit_code=2)
    assert "has not been handled yet" in missing.stderr


def test_bad_file_is_refused_with_row_and_column_and_nothing_is_imported(etl: Etl, tmp_path: Path) -> None:
    good = ("B-1", "坏文件店", "赵六", "", "paid", "5", "1", "2026-05-06 12:00:00")
    path = write_csv(
        tmp_path / "bad.csv", [good, ("B-2", "坏文件店", "赵六", "", "paid", "five", "1", "2026-05-06 12:00:00")]
    )
    before = etl("imports", "--format", "csv", "--limit", "1000").stdout
    result = etl("import", str(path), exit_code=2)
    assert "bad.csv" in result.stderr
    assert "row 3" in result.stderr
    assert "amount" in result.stderr
    assert "Traceback" not in result.stderr
    assert etl("imports", "--format", "csv", "--limit", "1000").stdout == before


def test_backfill_applies_a_changed_type_mapping(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    path = write_csv(
        tmp_path / "mapped.csv", [("M-1", "映射店", "钱七", "样衣", "paid", "5", "1", "2026-07-07 12:00:00")]
    )
    import_and_wait(etl, str(path), "--create-shops")
    with stack_engine.begin() as connection:
        connection.execute(sa.insert(order_type_mappings).values(raw_order_type="样衣", system_order_type="SAMPLE"))
    etl("backfill", "--from", "2026-07-01", "--to", "2026-07-10", "--timeout", "90")
    rows = json.loads(etl("show", "customers", "--customer", "钱七", "--format", "json").stdout)
    assert [row["sample_count"] for row in rows] == [1]
    assert find_differences(stack_engine, stack_settings) == []
    etl("backfill", "--from", "1990-01-01", "--to", "1990-01-02", exit_code=2)


def test_work_of_a_killed_worker_is_done_by_another(
    etl: Etl, stack_engine: sa.Engine, stack_settings: EtlSettings, tmp_path: Path
) -> None:
    orders = [
        (f"K{n}", "断电店", f"客户{n % 500}", "大货订单", "paid", "1.5", "1", f"2026-06-{n % 28 + 1:02} 08:00:00")
        for n in range(6_000)
    ]
    path = write_csv(tmp_path / "kill.csv", orders)
    # 命令还没有退出，运行也许就做完了：先看着，再导入
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_the_first_that_claims, stack_engine)
        report = json.loads(etl("import", str(path), "--create-shops", "--json").stdout)
        assert killed.result(), "no worker claimed the import"
    etl("wait", "--import-id", report["import_id"], "--timeout", "90")
    assert find_differences(stack_engine, stack_settings) == []


def kill_the_first_that_claims(engine: sa.Engine) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            owner = connection.execute(sa.select(leases.c.owner)).scalar()
        if owner is not None:
            os.kill(int(owner.rpartition(":")[2]), signal.SIGKILL)
            return True
    return False


def test_status_counts_what_is_due_and_queued(etl: Etl) -> None:
    report = json.loads(etl("status", "--json").stdout)
    assert {row["asset"] for row in report["ledger"]} == set(asset_folders())
    assert {row["queue"] for row in report["queues"]} >= {
        "EVENTS.etl-bridge_data_import-completed",
        "TASKS.event",
        "EVENTS_DLQ",
    }


def materialized_partitions(query: Query, asset: str) -> set[str]:
    text = """query($key: AssetKeyInput!) { assetOrError(assetKey: $key) { ... on Asset {
        assetMaterializations(limit: 2000) { partition } } } }"""
    found = query(text, key={"path": [asset]})["assetOrError"]["assetMaterializations"]
    return {materialization["partition"] for materialization in found}
