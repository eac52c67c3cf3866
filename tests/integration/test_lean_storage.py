"""工人攒着写 Dagster 的事件：次序与原样的一致，该急的不等，数据库走开一会儿也不丢。"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetExecutionContext,
    AssetKey,
    AssetMaterialization,
    AssetObservation,
    AssetRecordsFilter,
    AssetSpec,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    EventLogEntry,
    EventLogRecord,
    RunsFilter,
    asset,
    materialize,
)
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.events import AssetMaterializationPlannedData, AssetObservationData, StepMaterializationData
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage
from dagster_shared.serdes import deserialize_value

from bridge.warm_dagster import lean_storage
from bridge.warm_dagster.code_location import CodeLocation, _kind_of_faults
from bridge.warm_dagster.code_location_name import CODE_MODULE, JOB_NAME, LOCATION_NAME
from bridge.warm_dagster.instance import deferring_events, flush_events, open_instance
from bridge.warm_dagster.internals import EVENT_TYPE_TO_PIPELINE_RUN_STATUS
from bridge.warm_dagster.lean_events import LeanEventLogStorage
from bridge.warm_dagster.storage_faults import noting_faults
from etl_assets.core import silent_connections
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.databases import cloned_database

from .warm_postgres import dagster_on_postgres

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
    with dagster_on_postgres(engine, tmp_path_factory.mktemp("dagster")) as instance:
        yield instance


def happens(instance: DagsterInstance, run_id: str, *types: DagsterEventType) -> None:
    for event_type in types:
        made = StepMaterializationData(
            AssetMaterialization(AssetKey("orders"), partition="2026-01-05", tags={DATA_VERSION_TAG: "7"})
        )
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


def test_events_wait_for_the_next_that_matters_and_keep_their_order(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
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


def test_what_could_not_be_written_until_a_run_is_over_does_not_come_back_in_the_next(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
    first, second = str(uuid4()), str(uuid4())
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE dagster.event_logs RENAME TO event_logs_away")
    with pytest.raises(sa.exc.DBAPIError), deferring_events(instance):
        happens(instance, first, *LATER)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE dagster.event_logs_away RENAME TO event_logs")
    with deferring_events(instance):
        happens(instance, second, *LATER)
    assert stored(engine, first) == []
    assert stored(engine, second) == names(*LATER)


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
    "end",
    [DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_CANCELED, DagsterEventType.RUN_FAILURE],
    ids=lambda end: end.value,
)
def test_status_of_a_run_is_what_the_stock_storage_would_have_written(
    instance: DagsterInstance, end: DagsterEventType
) -> None:
    written = []
    for handle in (
        instance.run_storage.handle_run_event,
        partial(PostgresRunStorage.handle_run_event, instance.run_storage),
    ):
        run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4()), tags={"kept": "yes"}))
        at = datetime(2026, 1, 5, 8, tzinfo=UTC)
        for event_type in (DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START, end):
            handle(run.run_id, DagsterEvent(event_type.value, "etl"), at)
            at += timedelta(seconds=1)
        record = instance.get_run_record_by_id(run.run_id)
        assert record is not None
        written.append(
            (
                record.dagster_run.status,
                record.dagster_run.tags,
                record.start_time,
                record.end_time,
                record.update_timestamp,
            )
        )
    assert written[0] == written[1]
    assert written[0][0] is EVENT_TYPE_TO_PIPELINE_RUN_STATUS[end]


ENDS = (DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.value)
def test_what_a_thawed_worker_says_too_late_does_not_change_how_a_run_ended(
    instance: DagsterInstance, end: DagsterEventType
) -> None:
    """除了成功：数据有栅栏，做成了是真的，别人只是以为它死了。"""
    run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4())))
    happens(instance, run.run_id, DagsterEventType.RUN_START, end)
    ended = instance.get_run_record_by_id(run.run_id)
    for late in EVENT_TYPE_TO_PIPELINE_RUN_STATUS:
        if (late, end) != (DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE):
            happens(instance, run.run_id, late)
            assert instance.get_run_record_by_id(run.run_id) == ended
    happens(instance, run.run_id, DagsterEventType.RUN_SUCCESS)
    last = instance.get_run_by_id(run.run_id)
    assert last is not None
    assert last.status is (
        DagsterRunStatus.CANCELED if end is DagsterEventType.RUN_CANCELED else DagsterRunStatus.SUCCESS
    )


@pytest.mark.parametrize("now", [DagsterEventType.RUN_START, DagsterEventType.RUN_CANCELING], ids=lambda now: now.value)
def test_run_that_is_being_executed_does_not_go_back_to_waiting(
    instance: DagsterInstance, now: DagsterEventType
) -> None:
    """拿到手就停住的，醒来时别人已经在做。"""
    run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4())))
    happens(instance, run.run_id, DagsterEventType.RUN_STARTING, now)
    before = instance.get_run_record_by_id(run.run_id)
    happens(instance, run.run_id, DagsterEventType.RUN_STARTING, DagsterEventType.RUN_ENQUEUED)
    assert instance.get_run_record_by_id(run.run_id) == before


def test_a_run_is_found_as_the_stock_storage_finds_it(instance: DagsterInstance) -> None:
    run = instance.add_run(DagsterRun(job_name="etl", run_id=str(uuid4()), tags={"kept": "yes"}))
    instance.report_run_canceling(run)
    for run_id in (run.run_id, str(uuid4())):
        wanted = RunsFilter(run_ids=[run_id])
        assert instance.run_storage.get_run_records(wanted, 1) == PostgresRunStorage.get_run_records(
            instance.run_storage, wanted, 1
        )
    assert len(instance.run_storage.get_run_records(RunsFilter(run_ids=[run.run_id]), 1)) == 1
    elsewhere = RunsFilter(run_ids=[run.run_id], job_name="another")
    assert instance.run_storage.get_run_records(elsewhere, 1) == []


def test_record_of_a_check_that_could_not_be_written_is_written_later_and_once(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
    run_id, check = str(uuid4()), AssetCheckKey(AssetKey("orders"), "accounting")
    evaluation = AssetCheckEvaluation(
        asset_key=check.asset_key, check_name=check.name, passed=True, partition="2026-01-05"
    )
    event = DagsterEvent(
        DagsterEventType.ASSET_CHECK_EVALUATION.value, "etl", step_key="orders", event_specific_data=evaluation
    )
    with deferring_events(instance):
        instance.handle_new_event(log_entry(run_id, event))
        happens(instance, run_id, DagsterEventType.ASSET_MATERIALIZATION)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE dagster.asset_check_executions RENAME evaluation_event TO away")
        for _ in range(2):
            with pytest.raises(sa.exc.DBAPIError):
                flush_events(instance)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE dagster.asset_check_executions RENAME away TO evaluation_event")
    assert stored(engine, run_id) == names(
        DagsterEventType.ASSET_CHECK_EVALUATION, DagsterEventType.ASSET_MATERIALIZATION
    )
    (record,) = instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
    assert record.run_id == run_id
    assert tags_of(engine, run_id) == ["7"]


def test_events_are_seen_while_the_record_of_their_asset_waits_for_another_run(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
    """跟着编号读的人（传感器、网页）不等：编号发出去而还看不见的时候，他们会越过它。"""
    run_id, made = str(uuid4()), DagsterEventType.ASSET_MATERIALIZATION
    happens(instance, str(uuid4()), made)
    with ThreadPoolExecutor(1) as threads, deferring_events(instance):
        happens(instance, run_id, *LATER, made)
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT FROM dagster.asset_keys FOR UPDATE")
            flushing = threads.submit(flush_events, instance)
            wait_for_a_lock(engine, "asset_keys")
            seen = stored(engine, run_id)
        flushing.result(timeout=10)
    assert seen == names(*LATER, made)


def test_many_materializations_are_one_insert_one_of_tags_and_one_row_of_the_asset(instance: DagsterInstance) -> None:
    with deferring_events(instance):
        happens(instance, str(uuid4()), *[DagsterEventType.STEP_START, *[DagsterEventType.ASSET_MATERIALIZATION] * 30])
        with sa_statements(instance) as asked:
            flush_events(instance)
    written, recorded = asked
    assert written.startswith("INSERT INTO event_logs")
    assert re.findall(r"INSERT INTO (\w+)", recorded) == ["asset_event_tags", "asset_keys"]


def test_what_a_run_plans_is_one_insert_and_one_message(instance: DagsterInstance, engine: sa.Engine) -> None:
    """网页建一个运行，Dagster 就这样写；工人正攒着的不会被越过。"""
    run_id = str(uuid4())
    planned = [log_entry(run_id, materialization_planned(AssetKey(f"planned_{number}"))) for number in range(3)]
    happens(instance, str(uuid4()), DagsterEventType.ASSET_MATERIALIZATION)  # 头一回还要看一眼表
    with sa_statements(instance) as asked:
        instance.event_log_storage.store_event_batch(planned)
    written, recorded = asked
    assert written.startswith("INSERT INTO event_logs")
    assert re.findall(r"INSERT INTO (\w+)", recorded) == ["asset_keys"] * 3
    with deferring_events(instance):
        happens(instance, run_id, DagsterEventType.STEP_START)
        instance.event_log_storage.store_event_batch(planned)
        made = materialized(AssetKey("planned_0"), tags={})
        instance.event_log_storage.store_event_batch([log_entry(run_id, made), log_entry(run_id, made)])
    three = [DagsterEventType.ASSET_MATERIALIZATION_PLANNED] * 3
    twice = [DagsterEventType.ASSET_MATERIALIZATION] * 2
    assert stored(engine, run_id) == names(*three, DagsterEventType.STEP_START, *three, *twice)


def test_the_row_of_an_asset_is_what_the_stock_storage_would_have_written(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
    """一批里先计划、再物化、再计划、再观察，合成一次写，与一个一个写的一样。"""
    storage, rows = instance.event_log_storage, {}
    for name in ("batched", "stock"):
        key = AssetKey(f"row_{name}")
        entries = [
            log_entry("11111111-0000-4000-8000-000000000001", materialization_planned(key)),
            log_entry("11111111-0000-4000-8000-000000000001", materialized(key, tags={"batch": "1"})),
            log_entry("11111111-0000-4000-8000-000000000002", materialization_planned(key)),
            log_entry("11111111-0000-4000-8000-000000000003", observed(key)),
        ]
        entries = [entry._replace(timestamp=1_800_000_000.0 + second) for second, entry in enumerate(entries)]
        with deferring_events(instance):
            for entry in entries:
                storage.store_event(entry) if name == "batched" else PostgresEventLogStorage.store_event(storage, entry)
        with engine.connect() as connection:
            query = sa.text("SELECT * FROM dagster.asset_keys WHERE asset_key = :key")
            row = dict(connection.execute(query, {"key": key.to_string()}).mappings().one())
        last = deserialize_value(row.pop("last_materialization"), EventLogRecord)
        rows[name] = {
            column: row[column] for column in ("last_run_id", "last_materialization_timestamp", "asset_details")
        }
        rows[name] |= {"made_by": last.run_id, "made_at": last.timestamp}
    assert rows["batched"] == rows["stock"]


def test_a_run_that_says_what_cannot_be_stored_ends_as_it_should(instance: DagsterInstance, engine: sa.Engine) -> None:
    """分区里有 NUL 的物化 PostgreSQL 不收：别的事件都在，次序照旧，运行不会停在 STARTED。"""

    @asset
    def thing() -> None:
        context = AssetExecutionContext.get()
        context.log.info("before")
        context.log_event(AssetMaterialization("thing", partition="bad\0partition"))
        context.log.info("after")
        raise ValueError("said by the asset")

    with deferring_events(instance):
        result = materialize([thing], instance=instance, raise_on_error=False)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.status is DagsterRunStatus.FAILURE
    logs = instance.all_logs(result.run_id)
    messages = [entry.user_message for entry in logs]
    (refused,) = [entry for entry in logs if "could not be stored" in entry.user_message]
    assert refused.level == logging.ERROR
    assert "ASSET_MATERIALIZATION of thing" in refused.user_message
    assert "NUL" in refused.user_message
    assert messages.index("before") < messages.index(refused.user_message) < messages.index("after")
    ends = [DagsterEventType.STEP_FAILURE.value, DagsterEventType.RUN_FAILURE.value]
    assert [kind for kind in stored(engine, result.run_id) if kind in ends] == ends


def test_an_event_whose_records_are_refused_does_not_stop_those_of_others(
    instance: DagsterInstance, engine: sa.Engine
) -> None:
    run_id = str(uuid4())
    with deferring_events(instance):
        happens(instance, run_id, DagsterEventType.ASSET_MATERIALIZATION)
        instance.handle_new_event(log_entry(run_id, materialized(AssetKey("orders"), tags={DATA_VERSION_TAG: "7\0"})))
        happens(instance, run_id, DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.STEP_RESTARTED)
    assert len([kind for kind in stored(engine, run_id) if kind is not None]) == 4
    (line,) = [entry for entry in instance.all_logs(run_id) if "not in the records" in entry.user_message]
    assert line.level == logging.ERROR
    assert tags_of(engine, run_id) == ["7", "7"]


def test_outside_a_run_a_refused_event_is_an_error_of_its_writer(instance: DagsterInstance) -> None:
    with pytest.raises(ValueError, match="NUL"):
        instance.handle_new_event(log_entry(str(uuid4()), materialized(AssetKey("orders"), partition="\0")))


def test_a_run_goes_on_saying_things_while_its_log_is_locked(instance: DagsterInstance, engine: sa.Engine) -> None:
    """CREATE INDEX 锁着 event_logs：写日志的心跳等着，运行不等。"""
    run_id = str(uuid4())
    with ThreadPoolExecutor(2) as threads, deferring_events(instance):
        happens(instance, run_id, DagsterEventType.STEP_START)
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE dagster.event_logs IN SHARE MODE")
            flushing = threads.submit(flush_events, instance)
            wait_for_a_lock(engine, "event_logs")
            threads.submit(happens, instance, run_id, DagsterEventType.STEP_RESTARTED).result(timeout=5)
            assert not flushing.done()
        flushing.result(timeout=10)
    assert stored(engine, run_id) == names(DagsterEventType.STEP_START, DagsterEventType.STEP_RESTARTED)


def test_events_that_wait_for_a_lock_beyond_the_limit_are_stored_once(
    instance: DagsterInstance, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """切断等着的 INSERT，服务器照样等下去：下一次又写一遍，锁放开时全都提交。"""
    assert instance
    monkeypatch.setattr(silent_connections, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(silent_connections, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(lean_storage, "_LONGEST_WAIT_SECONDS", 0.5)
    run_id, made = str(uuid4()), DagsterEventType.ASSET_MATERIALIZATION
    with open_instance() as patient, ThreadPoolExecutor(1) as threads, deferring_events(patient):
        happens(patient, run_id, made)
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE dagster.event_logs IN SHARE MODE")
            flushing = threads.submit(flush_events, patient)
            wait_for_a_lock(engine, "event_logs")
            time.sleep(2)
            assert not flushing.done()
        flushing.result(timeout=10)
    assert stored(engine, run_id) == names(made)


@pytest.mark.parametrize("deleted", ["run wipe", "plans"])
def test_a_warm_worker_makes_runs_after_the_history_is_wiped(
    instance: DagsterInstance, engine: sa.Engine, deleted: str
) -> None:
    location = CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)
    day = DayRange(date(2026, 1, 5), date(2026, 1, 5))
    create = partial(location.create_run, instance, job_name=JOB_NAME, assets=["orders"], days=day, tags={})
    before = create(run_id=str(uuid4()))
    assert before.execution_plan_snapshot_id is not None
    assert instance.get_execution_plan_snapshot(before.execution_plan_snapshot_id) is not None
    if deleted == "run wipe":
        subprocess.run(
            [sys.executable, "-P", "-m", "dagster", "run", "wipe", "--force"], check=True, capture_output=True
        )
        assert instance.get_run_by_id(before.run_id) is None
    else:
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM dagster.snapshots WHERE snapshot_type = 'EXECUTION_PLAN'")
    after = create(run_id=str(uuid4()))
    assert instance.get_run_by_id(after.run_id) is not None
    query = sa.text("SELECT count(*) FROM dagster.snapshots WHERE snapshot_id IN (:job, :plan)")
    with engine.connect() as connection:
        assert connection.scalar(query, {"job": after.job_snapshot_id, "plan": after.execution_plan_snapshot_id}) == 2


def test_what_the_storage_threw_in_a_step_is_known_as_it_was(instance: DagsterInstance) -> None:
    """Dagster 只留下类名与文字；别的线程（心跳写日志的）出的错不是这个运行的。"""

    def refuse() -> None:
        with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]  # PostgreSQL 的
            connection.exec_driver_sql("SELECT 1 FROM no_such_table")

    @asset
    def refused() -> None:
        refuse()

    with noting_faults() as faults, ThreadPoolExecutor(1) as threads:
        assert threads.submit(refuse).exception() is not None
        assert faults == []
        assert not materialize([refused], instance=instance, raise_on_error=False).success
    assert _kind_of_faults(faults) == "refused"
    assert _kind_of_faults([]) == "unknown"


def test_an_observation_from_outside_is_an_input_version(instance: DagsterInstance) -> None:
    """外围应用报告来源的版本：读它的资产记下这个版本，与原样的存储一样。"""
    source = AssetKey(f"source_{uuid4().hex}")

    @asset(deps=[source])
    def reads_it() -> None: ...

    with DagsterInstance.get() as outside:
        outside.report_runless_asset_event(AssetObservation(source, tags={DATA_VERSION_TAG: "from outside"}))
        (observed_there,) = outside.fetch_observations(source, limit=1).records
    with deferring_events(instance):
        assert materialize([reads_it, AssetSpec(source)], instance=instance, selection=[reads_it]).success
    latest = instance.get_latest_materialization_event(AssetKey("reads_it"))
    assert latest is not None
    assert latest.asset_materialization is not None
    assert latest.asset_materialization.tags is not None
    assert latest.asset_materialization.tags[f"dagster/input_data_version/{source.path[0]}"] == "from outside"
    assert latest.asset_materialization.tags[f"dagster/input_event_pointer/{source.path[0]}"] == str(
        observed_there.storage_id
    )


def materialized(key: AssetKey, *, partition: str = "2026-01-05", tags: dict[str, str] | None = None) -> DagsterEvent:
    made = AssetMaterialization(key, partition=partition, tags=tags)
    kind = DagsterEventType.ASSET_MATERIALIZATION.value
    return DagsterEvent(kind, "etl", step_key="orders", event_specific_data=StepMaterializationData(made))


def materialization_planned(key: AssetKey) -> DagsterEvent:
    kind = DagsterEventType.ASSET_MATERIALIZATION_PLANNED.value
    return DagsterEvent(kind, "etl", step_key="orders", event_specific_data=AssetMaterializationPlannedData(key))


def observed(key: AssetKey) -> DagsterEvent:
    kind = DagsterEventType.ASSET_OBSERVATION.value
    return DagsterEvent(kind, "etl", step_key="orders", event_specific_data=AssetObservationData(AssetObservation(key)))


def tags_of(engine: sa.Engine, run_id: str) -> list[str]:
    query = "SELECT value FROM dagster.asset_event_tags JOIN dagster.event_logs ON event_id = event_logs.id WHERE run_id = :run_id"
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(query), {"run_id": run_id}))


def wait_for_a_lock(engine: sa.Engine, table: str) -> None:
    """直到有语句在等这个表或它的行的锁。"""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :on_table AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            if connection.scalar(waiting, {"on_table": f"%{table}%"}):
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing waits for {table}")


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
