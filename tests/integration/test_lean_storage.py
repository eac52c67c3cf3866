"""工人攒着写 Dagster 的事件：次序与原样的一致，该急的不等，数据库走开一会儿也不丢。"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    EventLogEntry,
    RunsFilter,
)
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.events import StepMaterializationData
from dagster_postgres import PostgresRunStorage

from bridge import dagster_adapter
from bridge.dagster_adapter import deferring_events, flush_events, open_instance
from bridge.dagster_internals import EVENT_TYPE_TO_PIPELINE_RUN_STATUS, context_creation_job
from bridge.lean_storage import LeanEventLogStorage
from bridge.stack.dagster_home import DAGSTER_SCHEMA, build_dagster_postgres_url, create_dagster_storage, write_dagster_home
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.databases import cloned_database

LATER = (DagsterEventType.STEP_RESTARTED, DagsterEventType.STEP_START, DagsterEventType.STEP_SKIPPED)


@pytest.fixture(scope="module")
def engine(postgres_url: str, database_template: str) -> Iterator[sa.Engine]:
    """一个数据库够这里的测试用：Dagster 的表建一次要几秒。"""
    with cloned_database(postgres_url, database_template) as url:
        engine = build_engine(EtlSettings(database_url=url))
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def instance(engine: sa.Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    """真的存储，像工人那样打开。"""
    folder = tmp_path_factory.mktemp("dagster")
    write_dagster_home(folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        silenced = dagster_adapter._CONSOLE_LOGGERS  # 打开实例会换掉它，整个进程都受影响：之后换回来
        patch.setattr(context_creation_job, silenced, getattr(context_creation_job, silenced))
        patch.setenv("DAGSTER_HOME", str(folder / "home"))
        patch.setenv("DAGSTER_POSTGRES_URL", build_dagster_postgres_url(engine.url.render_as_string(hide_password=False)))
        create_dagster_storage(engine, schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=folder / "migrate.log")
        with open_instance() as instance:
            yield instance


def happens(instance: DagsterInstance, run_id: str, *types: DagsterEventType) -> None:
    for event_type in types:
        made = StepMaterializationData(AssetMaterialization(AssetKey("orders"), partition="2026-01-05", tags={DATA_VERSION_TAG: "7"}))
        event = DagsterEvent(
            event_type.value,
            "etl",
            step_key="orders",
            event_specific_data=made if event_type is DagsterEventType.ASSET_MATERIALIZATION else None,
        )
        instance.handle_new_event(log_entry(run_id, event))


def log_entry(run_id: str, event: DagsterEvent) -> EventLogEntry:
    return EventLogEntry(
        error_info=None,
        level=20,
        user_message="",
        run_id=run_id,
        timestamp=time.time(),
        step_key="orders",
        job_name="etl",
        dagster_event=event,
    )


def stored(engine: sa.Engine, run_id: str) -> list[str]:
    query = sa.text("SELECT dagster_event_type FROM dagster.event_logs WHERE run_id = :run_id ORDER BY id")
    with engine.connect() as connection:
        return list(connection.scalars(query, {"run_id": run_id}))


def names(*types: DagsterEventType) -> list[str]:
    return [event_type.value for event_type in types]


def test_events_wait_for_the_next_that_matters_and_keep_their_order(instance: DagsterInstance, engine: sa.Engine) -> None:
    run_id = str(uuid4())
    made = DagsterEventType.ASSET_MATERIALIZATION
    with deferring_events(instance):
        happens(instance, run_id, *LATER)
        assert stored(engine, run_id) == []
        happens(instance, run_id, made)
        assert stored(engine, run_id) == []
        latest = instance.get_latest_materialization_event(AssetKey("orders"))
        assert latest is not None
        assert latest.run_id == run_id
        assert stored(engine, run_id) == names(*LATER, made)
        happens(instance, run_id, *LATER)
        assert len(stored(engine, run_id)) == 4
    assert stored(engine, run_id) == names(*LATER, made, *LATER)


def test_flush_shows_what_a_long_step_has_said_so_far(instance: DagsterInstance, engine: sa.Engine) -> None:
    run_id = str(uuid4())
    with deferring_events(instance):
        happens(instance, run_id, DagsterEventType.STEP_START)
        flush_events(instance)
        assert stored(engine, run_id) == names(DagsterEventType.STEP_START)
        flush_events(instance)
    assert len(stored(engine, run_id)) == 1


def test_outside_a_run_nothing_waits(instance: DagsterInstance, engine: sa.Engine) -> None:
    run_id = str(uuid4())
    happens(instance, run_id, DagsterEventType.STEP_RESTARTED)
    assert stored(engine, run_id) == names(DagsterEventType.STEP_RESTARTED)


def test_events_outlast_a_database_that_is_away_for_a_moment(instance: DagsterInstance, engine: sa.Engine) -> None:
    run_id = str(uuid4())
    with deferring_events(instance):
        happens(instance, run_id, *LATER)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE dagster.event_logs RENAME TO event_logs_away")
        with pytest.raises(sa.exc.DBAPIError):
            flush_events(instance)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE dagster.event_logs_away RENAME TO event_logs")
        happens(instance, run_id, DagsterEventType.STEP_RESTARTED)
    assert stored(engine, run_id) == names(*LATER, DagsterEventType.STEP_RESTARTED)


def test_what_a_run_made_is_known_without_asking_and_is_what_is_stored(instance: DagsterInstance) -> None:
    key, made = AssetKey("orders"), DagsterEventType.ASSET_MATERIALIZATION
    storage = instance.event_log_storage
    with deferring_events(instance):
        happens(instance, str(uuid4()), made)
        (remembered,) = storage.get_asset_records([key])
        tags = storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05"])
        with sa_statements(instance) as asked:
            assert storage.get_asset_records([key]) == [remembered]
            assert storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05"]) == tags
            (newest,) = storage.fetch_materializations(AssetRecordsFilter(key, ["2026-01-05"]), limit=1).records
        assert asked == []
        with sa_statements(instance) as asked:
            storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05", "2026-01-06"])
            storage.get_asset_records([AssetKey("customers")])
            storage.fetch_materializations(AssetRecordsFilter(key, ["2026-01-05", "2026-01-06"]), limit=2)
        assert len(asked) >= 3
    assert storage.fetch_materializations(AssetRecordsFilter(key, ["2026-01-05"]), limit=1).records == [newest]
    (read,) = storage.get_asset_records([key])
    assert read.asset_entry.last_materialization_record == remembered.asset_entry.last_materialization_record
    assert (
        storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05"])
        == tags
        == {"2026-01-05": {DATA_VERSION_TAG: "7"}}
    )


@pytest.mark.parametrize(
    "end", [DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_CANCELED, DagsterEventType.RUN_FAILURE], ids=lambda end: end.value
)
def test_status_of_a_run_is_what_the_stock_storage_would_have_written(instance: DagsterInstance, end: DagsterEventType) -> None:
    written = []
    for handle in (instance.run_storage.handle_run_event, partial(PostgresRunStorage.handle_run_event, instance.run_storage)):
        run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4()), tags={"kept": "yes"}))
        at = datetime(2026, 1, 5, 8, tzinfo=UTC)
        for event_type in (DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START, end):
            handle(run.run_id, DagsterEvent(event_type.value, "etl"), at)
            at += timedelta(seconds=1)
        record = instance.get_run_record_by_id(run.run_id)
        assert record is not None
        written.append((record.dagster_run.status, record.dagster_run.tags, record.start_time, record.end_time, record.update_timestamp))
    assert written[0] == written[1]
    assert written[0][0] is EVENT_TYPE_TO_PIPELINE_RUN_STATUS[end]


def test_a_run_is_found_as_the_stock_storage_finds_it(instance: DagsterInstance) -> None:
    run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4()), tags={"kept": "yes"}))
    instance.report_run_canceling(run)
    for run_id in (run.run_id, str(uuid4())):
        wanted = RunsFilter(run_ids=[run_id])
        assert instance.run_storage.get_run_records(wanted, 1) == PostgresRunStorage.get_run_records(instance.run_storage, wanted, 1)
    assert len(instance.run_storage.get_run_records(RunsFilter(run_ids=[run.run_id]), 1)) == 1
    elsewhere = RunsFilter(run_ids=[run.run_id], job_name="another")
    assert instance.run_storage.get_run_records(elsewhere, 1) == []


def test_record_of_a_check_is_written_with_its_event_or_not_at_all(instance: DagsterInstance, engine: sa.Engine) -> None:
    run_id, check = str(uuid4()), AssetCheckKey(AssetKey("orders"), "accounting")
    evaluation = AssetCheckEvaluation(asset_key=check.asset_key, check_name=check.name, passed=True, partition="2026-01-05")
    event = DagsterEvent(DagsterEventType.ASSET_CHECK_EVALUATION.value, "etl", step_key="orders", event_specific_data=evaluation)
    entry = log_entry(run_id, event)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE dagster.asset_check_executions RENAME evaluation_event TO away")
    with deferring_events(instance):
        instance.handle_new_event(entry)
        with pytest.raises(sa.exc.DBAPIError):
            flush_events(instance)
        assert stored(engine, run_id) == []
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE dagster.asset_check_executions RENAME away TO evaluation_event")
    assert stored(engine, run_id) == names(DagsterEventType.ASSET_CHECK_EVALUATION)
    (record,) = instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
    assert record.run_id == run_id


@contextmanager
def sa_statements(instance: DagsterInstance) -> Iterator[list[str]]:
    storage = instance.event_log_storage
    assert isinstance(storage, LeanEventLogStorage)
    asked: list[str] = []

    def ask(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    sa.event.listen(storage._engine, "before_cursor_execute", ask)
    yield asked
    sa.event.remove(storage._engine, "before_cursor_execute", ask)
