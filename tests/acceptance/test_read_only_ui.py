"""`etl up --read-only-ui`：网页给看，什么也不让做；真的栈。"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from tests.acceptance.conftest import asking
from tests.acceptance.test_foreign_pages import VARIABLES, launched

LAUNCH = "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename } }"


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StackAddresses]:
    """命令的 `--read-only-ui` 就是设这个变量。"""
    monkeypatch.setenv("ETL_UI_READ_ONLY", "1")
    stack = Stack(
        tmp_path / "state",
        settings=EtlSettings(database_url=""),
        bridge_settings=BridgeSettings(nats_url=""),
        port=find_free_port(),
        durable=False,
        workers=1,
    )
    yield stack.start()
    stack.stop()


@pytest.mark.timeout(600)
def test_read_only_ui_shows_and_launches_nothing(shown: StackAddresses) -> None:
    query = asking(shown.ui_url)
    assert query(LAUNCH, **VARIABLES)["launchRun"]["__typename"] == "UnauthorizedError"
    report = urllib.request.Request(  # noqa: S310  # 地址是自己的栈
        f"{shown.ui_url}/report_asset_materialization/orders?partition=2026-01-05", b"", method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(report, timeout=60)  # noqa: S310  # 同上
    with refused.value as answer:
        assert (answer.code, answer.read()) == (403, b"this UI is read-only (ETL_UI_READ_ONLY)\n")
    assert launched(query) == 0
    assert {node["assetKey"]["path"][0] for node in query("{ assetNodes { assetKey { path } } }")["assetNodes"]} > {
        "leads"
    }
