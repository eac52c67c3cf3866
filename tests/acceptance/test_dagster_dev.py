"""`dagster dev` 不带 -w：代码位置写在 pyproject.toml 里。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.warm_dagster.code_location_name import LOCATION_NAME
from etl_assets.embedded.loopback_port import find_free_port

ROOT = Path(__file__).parents[2]
READY_SECONDS = 240.0
LOCATIONS = "{workspaceOrError {... on Workspace {locationEntries {name locationOrLoadError {__typename}}}}}"


@pytest.fixture
def port(postgres_url: str, tmp_path: Path) -> Iterator[int]:
    chosen = find_free_port()
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    command = [sys.executable, "-m", "dagster", "dev", "--port", str(chosen)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"ETL_DATABASE_URL": postgres_url, "DAGSTER_HOME": str(tmp_path)},
            stdout=log,
            stderr=log,
        )
    yield chosen
    process.terminate()  # 它自己停下网页、守护进程与代码服务器
    process.wait(120)


def test_dagster_dev_serves_the_code_location(port: int) -> None:
    assert locations(port) == [{"name": LOCATION_NAME, "locationOrLoadError": {"__typename": "RepositoryLocation"}}]


def locations(port: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + READY_SECONDS
    url = f"http://127.0.0.1:{port}/graphql"
    request = urllib.request.Request(
        url, json.dumps({"query": LOCATIONS}).encode(), {"content-type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # 自己起的服务
                found: list[dict[str, Any]] = json.load(response)["data"]["workspaceOrError"]["locationEntries"]
                return found
        except (urllib.error.URLError, TimeoutError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_dg_dev_is_told_the_same() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    project = tool["dg"]["project"]
    told = (project["code_location_name"], f"{project['root_module']}.definitions")
    assert (
        told
        == (tool["dagster"]["code_location_name"], tool["dagster"]["module_name"])
        == (LOCATION_NAME, "etl_assets.definitions")
    )
