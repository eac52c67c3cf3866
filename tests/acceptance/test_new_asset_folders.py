"""真的栈：做过几天的安装换上多了两个文件夹的代码，新的资产补得上过去，也跟得上以后。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bridge.stack.addresses import read_addresses
from etl_assets.embedded.loopback_port import find_free_port
from tests.acceptance.conftest import asking
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


class Installation:
    """一个状态文件夹；code 是此刻用的代码。"""

    def __init__(self, state_dir: Path, code: Path) -> None:
        self.state_dir = state_dir
        self.code = code

    def run(self, *arguments: str, exit_code: int = 0) -> str:
        addresses = read_addresses(self.state_dir)
        environment = self._environment | (addresses.environment() if addresses else {})
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=self.code, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == exit_code, result.stdout + result.stderr
        return result.stdout

    def etl(self, *arguments: str, exit_code: int = 0) -> str:
        return self.run("-m", "bridge.cli.main", *arguments, exit_code=exit_code)

    @contextmanager
    def up(self) -> Iterator[None]:
        command = [sys.executable, "-m", "bridge.cli.main", "up", "--port", str(find_free_port()), "--workers", "1"]
        with (self.state_dir.parent / "up.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.code, env=self._environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while read_addresses(self.state_dir) is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)

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

    @property
    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
        return {**kept, "PYTHONPATH": str(self.code), "ETL_STATE_DIR": str(self.state_dir)}


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "state", copy_without_new_assets(tmp_path / "before"))


def orders_file(path: Path, *orders: tuple[str, str, str]) -> Path:
    """订单号、客户、日子。"""
    rows = [(order_id, "旗舰店", customer, "大货订单", "completed", "10.00", "1", f"{day} 12:00:00") for order_id, customer, day in orders]
    return write_csv(path, rows)


def test_new_assets_are_filled_back_and_follow_every_import(installation: Installation, tmp_path: Path) -> None:
    with installation.up():
        earlier = installation.import_file(
            orders_file(tmp_path / "1.csv", ("A", "张三", "2026-01-05"), ("B", "李四", "2026-01-05"), ("C", "张三", "2026-01-06"))
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
        nodes = asking(addresses)(LINEAGE)["assetNodes"]
        upstreams = {node["assetKey"]["path"][0]: {key["path"][0] for key in node["dependencyKeys"]} for node in nodes}
        assert (upstreams["products"], upstreams["daily_report"]) == ({"orders"}, {"customers", "products"})
        found = {finding["check"]: finding["state"] for finding in json.loads(installation.etl("doctor", "--json"))}
        assert (found["schema"], found["ledger"], found["table checks"]) == ("ok", "ok", "ok")
