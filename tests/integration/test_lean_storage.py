"""工人攒着写 Dagster 的事件：次序与原样的一致，该急的不等，数据库走开一会儿也不丢。"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import AssetKey, AssetMaterialization, DagsterEvent, DagsterEventType, DagsterInstance, EventLogEntry
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.events import StepMaterializationData

from bridge import dagster_adapter
from bridge.dagster_adapter import deferring_events, flush_events, open_instance
from bridge.dagster_internals import context_creation_job
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
        entry = EventLogEntry(
            error_info=None,
            level=20,
            user_message="",
            run_id=run_id,
            timestamp=time.time(),
            step_key="orders",
            job_name="etl",
            dagster_event=event,
        )
        instance.handle_new_event(entry)


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
        assert stored(engine, run_id) == names(*LATER, made)
        latest = instance.get_latest_materialization_event(AssetKey("orders"))
        assert latest is not None
        assert latest.run_id == run_id
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
        assert asked == []
        with sa_statements(instance) as asked:
            storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05", "2026-01-06"])
            storage.get_asset_records([AssetKey("customers")])
        assert len(asked) >= 2
    (read,) = storage.get_asset_records([key])
    assert read.asset_entry.last_materialization_record == remembered.asset_entry.last_materialization_record
    assert (
        storage.get_latest_tags_by_partition(key, made, [DATA_VERSION_TAG], ["2026-01-05"])
        == tags
        == {"2026-01-05": {DATA_VERSION_TAG: "7"}}
    )


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
