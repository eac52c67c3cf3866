"""bridge/warm_dagster/old_runs.py 用的都是 Dagster 私有的名字，只是文字：表、列、状态、事件、标签都还在。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dagster import DagsterEventType, DagsterRunStatus
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.event_log.schema import SqlEventLogStorageMetadata
from dagster._core.storage.runs.schema import RunStorageSqlMetadata
from dagster._core.storage.schedules.schema import ScheduleStorageSqlMetadata
from dagster._core.storage.tags import PARENT_RUN_ID_TAG, ROOT_RUN_ID_TAG

from bridge.warm_dagster import old_runs

SOURCE = Path(old_runs.__file__).read_text(encoding="utf-8")
TABLES = {
    name: set(table.c.keys())
    for metadata in (SqlEventLogStorageMetadata, RunStorageSqlMetadata, ScheduleStorageSqlMetadata)
    for name, table in metadata.tables.items()
}
USED = {
    "runs": {"id", "run_id", "status", "create_timestamp", "update_timestamp", "backfill_id"},
    "run_tags": {"run_id", "key", "value"},
    "event_logs": {"id", "run_id", "dagster_event_type", "asset_key", "partition"},
    "asset_event_tags": {"event_id"},
    "asset_check_executions": {
        *("id", "asset_key", "check_name", "run_id"),
        *("evaluation_event_storage_id", "materialization_event_storage_id"),
    },
    "job_ticks": {"id", "selector_id", "status", "timestamp"},
    "bulk_actions": {"key", "status", "timestamp"},
    "backfill_tags": {"backfill_id"},
}


def test_tables_and_columns_exist() -> None:
    assert {table: columns - TABLES[table] for table, columns in USED.items()} == {table: set() for table in USED}


def test_every_table_that_the_statements_name_is_listed_here() -> None:
    named = set(re.findall(r"(?:FROM|JOIN|DELETE FROM) ([a-z_]+)\b", SOURCE))
    assert named & TABLES.keys() == USED.keys()


def test_statuses_of_runs_backfills_and_ticks_mean_what_they_meant() -> None:
    assert set(old_runs.FINISHED_RUNS) == {status.value for status in FINISHED_STATUSES}
    assert {status.value for status in BulkActionStatus} - set(old_runs.UNFINISHED_BACKFILLS) == {
        *("COMPLETED", "FAILED", "CANCELED", "COMPLETED_SUCCESS", "COMPLETED_FAILED")
    }
    assert TickStatus.STARTED.value in SOURCE
    assert DagsterRunStatus.SUCCESS.value in old_runs.FINISHED_RUNS


@pytest.mark.parametrize("name", [*old_runs._HISTORY, *old_runs._ATTEMPTS])
def test_events_exist(name: str) -> None:
    assert DagsterEventType[name].value == name


def test_run_start_and_the_tags_of_a_retry_are_called_so() -> None:
    assert f"'{DagsterEventType.RUN_START.value}'" in SOURCE
    assert SOURCE.count(f"'{PARENT_RUN_ID_TAG}', '{ROOT_RUN_ID_TAG}'") == 2
