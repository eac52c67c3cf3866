"""真的栈：做过几天的安装换上多了两个文件夹的代码，新的资产补得上过去，也跟得上以后。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.stack.addresses import read_addresses
from tests.acceptance.conftest import asking
from tests.acceptance.installation import Installation
from tests.acceptance.test_main_flow import write_csv
from tests.integration.new_assets.copying import copy_with_new_assets, copy_without_new_assets

DAYS = ("--from", "2026-01-05", "--to", "2026-01-06")
ALL = {"orders", "customers", "products", "daily_report", "leads"}
LINEAGE = "{ assetNodes { assetKey { path } dependencyKeys { path } } }"
READ_COMPLETIONS = """
import asyncio, json
from bridge.events.history import read_completions
from bridge.settings import get_bridge_settings
print(json.dumps([[asset, event["status"], event["partitions"]] for asset, event in asyncio.run(read_completions(get_bridge_settings()))]))
"""


class Growing(Installation):
    """先没有那两个文件夹，后来有了。"""

    def import_file(self, file: Path) -> str:
        report: dict[str, Any] = json.loads(self.etl("import", str(file), "--create-shops", "--json"))
        return str(report["import_id"])

    def wait(self, import_id: str) -> None:
        self.etl("wait", "--import-id", import_id, "--timeout", "60")

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        wanted = {
            "products": ("day", "system_order_type", "order_count", "amount"),
            "daily_report": ("day", "customer_count", "order_count"),
        }
        rows = json.loads(self.etl("show", table, "--format", "json"))
        return sorted(tuple(row[name] for name in wanted[table]) for row in rows)


@pytest.fixture
def installation(tmp_path: Path) -> Growing:
    return Growing(tmp_path / "state", copy_without_new_assets(tmp_path / "before"))


def orders_file(path: Path, *orders: tuple[str, str, str]) -> Path:
    """订单号、客户、日子。"""
    rows = [
        (order_id, "旗舰店", customer, "大货订单", "completed", "10.00", "1", f"{day} 12:00:00")
        for order_id, customer, day in orders
    ]
    return write_csv(path, rows)


def test_new_assets_are_filled_back_and_follow_every_import(installation: Growing, tmp_path: Path) -> None:
    with installation.up():
        earlier = installation.import_file(
            orders_file(
                tmp_path / "1.csv",
                ("A", "张三", "2026-01-05"),
                ("B", "李四", "2026-01-05"),
                ("C", "张三", "2026-01-06"),
            )
        )
        installation.wait(earlier)
    installation.code = copy_with_new_assets(tmp_path / "copy")
    with installation.up():
        installation.wait(earlier)
        summary = {row["asset"]: row for row in json.loads(installation.etl("status", "--json"))["ledger"]}
        assert {asset: summary[asset]["due"] for asset in summary} == dict.fromkeys(ALL, 0)
        assert installation.rows("products") == []

        installation.etl("backfill", "--asset", "products", *DAYS, "--timeout", "60")
        assert installation.rows("products") == [("2026-01-05", "BULK", 2, "20.00"), ("2026-01-06", "BULK", 1, "10.00")]
        assert installation.rows("daily_report") == [("2026-01-05", 2, 2), ("2026-01-06", 1, 1)]

        installation.wait(installation.import_file(orders_file(tmp_path / "2.csv", ("D", "王五", "2026-01-06"))))
        assert installation.rows("products")[1] == ("2026-01-06", "BULK", 2, "20.00")
        assert installation.rows("daily_report")[1] == ("2026-01-06", 2, 2)
        completions = json.loads(installation.run("-c", READ_COMPLETIONS))
        assert {asset for asset, *of_event in completions if of_event == ["success", ["2026-01-06"]]} >= ALL

        addresses = read_addresses(installation.state_dir)
        assert addresses is not None
        nodes = asking(addresses.ui_url)(LINEAGE)["assetNodes"]
        upstreams = {node["assetKey"]["path"][0]: {key["path"][0] for key in node["dependencyKeys"]} for node in nodes}
        assert (upstreams["products"], upstreams["daily_report"]) == ({"orders"}, {"customers", "products"})
        found = {finding["check"]: finding["state"] for finding in json.loads(installation.etl("doctor", "--json"))}
        assert (found["schema"], found["ledger"], found["table checks"]) == ("ok", "ok", "ok")
