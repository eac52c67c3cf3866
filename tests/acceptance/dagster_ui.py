"""网页发出的 GraphQL：启动、重新执行、取消、回填，与它们的结果。"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from tests.acceptance.conftest import Query

REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "etl_assets"}
ASSETS = ("orders", "customers", "leads")
FINAL = ("SUCCESS", "FAILURE", "CANCELED")

_LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
    ... on LaunchRunSuccess { run { runId status } } ... on PythonError { message } ... on InvalidSubsetError { message } } }"""
_REEXECUTE = """mutation($p: ReexecutionParams!) { launchRunReexecution(reexecutionParams: $p) { __typename
    ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
_TERMINATE = """mutation($id: String!) { terminateRun(runId: $id, terminatePolicy: SAFE_TERMINATE) { __typename
    ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
_BACKFILL = """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename
    ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run { runId status parentRunId rootRunId tags { key value }
    assetSelection { path } assetMaterializations { assetKey { path } partition } } } }"""
_EVENTS = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
    ... on MessageEvent { message } ... on ErrorEvent { error { message causes { message } } } } } } }"""


class DagsterUi:
    """像网页那样对待一个栈。"""

    def __init__(self, query: Query) -> None:
        self._query = query

    def launch(
        self,
        assets: Iterable[str] = ASSETS,
        *,
        day: str | None = None,
        last_day: str | None = None,
        job: str = "__ASSET_JOB",
        **tags: str,
    ) -> str:
        """物化这些资产的一个分区，或一段（last_day）。"""
        keys = {"dagster/partition": day} if last_day is None else {}
        if last_day is not None:
            keys = {"dagster/asset_partition_range_start": day, "dagster/asset_partition_range_end": last_day}
        parameters = {
            "selector": {**REPOSITORY, "jobName": job, "assetSelection": [{"path": [asset]} for asset in assets]},
            "runConfigData": {},
            "mode": "default",
            "executionMetadata": {
                "tags": [{"key": key, "value": value} for key, value in {**keys, **tags}.items() if value]
            },
        }
        return str(self._ask(_LAUNCH, "launchRun", "LaunchRunSuccess", p=parameters)["run"]["runId"])

    def reexecute(self, run_id: str, strategy: str) -> str:
        """:param strategy: ALL_STEPS 或 FROM_FAILURE。"""
        answer = self._ask(
            _REEXECUTE, "launchRunReexecution", "LaunchRunSuccess", p={"parentRunId": run_id, "strategy": strategy}
        )
        return str(answer["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        self._ask(_TERMINATE, "terminateRun", "TerminateRunSuccess", id=run_id)

    def backfill(self, days: Sequence[str], assets: Iterable[str] = ASSETS) -> str:
        parameters = {
            "assetSelection": [{"path": [asset]} for asset in assets],
            "partitionNames": list(days),
            "title": "test",
        }
        return str(self._ask(_BACKFILL, "launchPartitionBackfill", "LaunchBackfillSuccess", p=parameters)["backfillId"])

    def run(self, run_id: str) -> dict[str, Any]:
        run: dict[str, Any] = self._query(_RUN, id=run_id)["runOrError"]
        return run | {"tags": {tag["key"]: tag["value"] for tag in run["tags"]}}

    def wait(self, run_id: str, *statuses: str, timeout_seconds: float = 60) -> dict[str, Any]:
        """等到它处于这些状态之一；缺省是等它结束。"""
        deadline = time.monotonic() + timeout_seconds
        while (run := self.run(run_id))["status"] not in (statuses or FINAL):
            assert time.monotonic() < deadline, (
                f"run {run_id} is {run['status']} after {timeout_seconds:g} s: {self.messages(run_id)}"
            )
            time.sleep(0.03)
        return run

    def messages(self, run_id: str) -> list[str]:
        events = self._query(_EVENTS, id=run_id)["logsForRun"]["events"]
        errors = [event["error"] for event in events if event.get("error")]
        causes = [cause for error in errors for cause in error["causes"]]
        return [found["message"] for found in (*events, *errors, *causes) if found.get("message")]

    def _ask(self, text: str, field: str, success: str, **variables: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._query(text, **variables)[field]
        assert answer["__typename"] == success, answer
        return answer
