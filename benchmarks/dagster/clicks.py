"""网页上的一次点击：发出 GraphQL 的 launchRun，等到运行成功。"""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

_LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
_STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
_REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "etl_assets"}
_ASSETS = ("orders", "customers", "leads")
_POLL_SECONDS = 0.01
_TIMEOUT_SECONDS = 120.0


def click(ui_url: str, day: str) -> float:
    """物化三个资产的一天；从发出请求到看见 SUCCESS 的秒数。

    :raises RuntimeError: 运行没有成功。
    """
    parameters = {
        "selector": {
            **_REPOSITORY,
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": [asset]} for asset in _ASSETS],
        },
        "runConfigData": {},
        "mode": "default",
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": day}]},
    }
    started = time.perf_counter()
    launched = ask(ui_url, _LAUNCH, p=parameters)["launchRun"]
    if launched["__typename"] != "LaunchRunSuccess":
        raise RuntimeError(f"cannot launch a run: {launched}")
    run_id = launched["run"]["runId"]
    while time.perf_counter() - started < _TIMEOUT_SECONDS:
        status = ask(ui_url, _STATUS, id=run_id)["runOrError"]["status"]
        if status == "SUCCESS":
            return time.perf_counter() - started
        if status in ("FAILURE", "CANCELED"):
            break
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"run {run_id} ended as {status}")


def ask(ui_url: str, text: str, **variables: Any) -> Any:
    body = json.dumps({"query": text, "variables": variables}).encode()
    request = urllib.request.Request(f"{ui_url}/graphql", body, {"content-type": "application/json"})  # noqa: S310  # 自己起的网页
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # 同上
        answer = json.load(response)
    if "errors" in answer:
        raise RuntimeError(f"GraphQL: {answer['errors']}")
    return answer["data"]
