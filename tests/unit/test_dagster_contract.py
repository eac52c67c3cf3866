"""bridge 对 Dagster 内部的假设，名字在不在见 test_dagster_internals；换了版本而这里失败，就去看用到它的模块。"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
from pathlib import Path

import pytest
from dagster import DagsterInstance, _loggers, asset, materialize
from dagster._core.execution import api as execution_api
from dagster._core.execution.context.data_version_cache import DataVersionCache
from dagster._core.instance.methods.event_methods import EventMethods
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.runs import SqlRunStorage
from dagster._daemon import cli as daemon_cli
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage
from dagster_webserver import cli as webserver_cli

from bridge.runs.run_queue import TaskQueueRunCoordinator, WarmRunLauncher
from bridge.warm_dagster import daemon, webserver
from bridge.warm_dagster import instance as dagster_instance
from bridge.warm_dagster.internals import (
    InMemoryJob,
    InstanceRef,
    RunCoordinator,
    RunLauncher,
    context_creation_job,
    create_execution_plan,
    create_pg_engine,
    execute_run_iterator,
)
from bridge.warm_dagster.lean_events import LeanEventLogStorage
from bridge.warm_dagster.lean_runs import LeanRunStorage
from bridge.warm_dagster.lean_storage import LeanStorage


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]  # 都是函数


def test_versions_are_the_pinned_ones() -> None:
    assert importlib.metadata.version("dagster") == "1.13.27"
    assert importlib.metadata.version("dagster-postgres") == "0.29.27"


def test_runs_are_created_with_these_arguments() -> None:
    used = {
        "job_name", "run_id", "run_config", "status", "tags", "root_run_id", "parent_run_id", "step_keys_to_execute",
        "execution_plan_snapshot", "job_snapshot", "parent_job_snapshot", "asset_selection", "asset_check_selection",
        "resolved_op_selection", "op_selection", "remote_job_origin", "job_code_origin", "asset_graph",
    }  # fmt: skip
    assert used <= parameters(DagsterInstance.create_run)


def test_a_job_in_memory_answers_and_is_narrowed_through_these_methods() -> None:
    assert parameters(InMemoryJob) == {"job_def"}
    assert parameters(InMemoryJob.get_repository_definition) == {"self"}
    assert parameters(InMemoryJob.get_subset) == {"self", "op_selection", "asset_selection", "asset_check_selection"}


def test_runs_are_planned_and_executed_through_these_functions() -> None:
    assert {"job", "run_config", "instance_ref"} <= parameters(create_execution_plan)
    assert {"job", "dagster_run", "instance"} <= parameters(execute_run_iterator)


def test_console_loggers_come_from_the_function_that_is_replaced() -> None:
    """看定义它的模块：用它的模块里那个，别的测试也许已经换掉了。"""
    assert parameters(getattr(_loggers, dagster_instance._CONSOLE_LOGGERS)) == {"instance"}
    assert dagster_instance._CONSOLE_LOGGERS in context_creation_job.create_log_manager.__code__.co_names


def test_coordinator_and_launcher_implement_exactly_what_dagster_asks_for() -> None:
    assert set(RunCoordinator.__abstractmethods__) == {"submit_run", "cancel_run"}
    assert set(RunLauncher.__abstractmethods__) == {"launch_run", "terminate"}
    for kind in (TaskQueueRunCoordinator, WarmRunLauncher):
        assert not getattr(kind, "__abstractmethods__", None)
        assert kind.from_config_value(None, {}).inst_data is None


def test_a_cancelled_run_ends_canceled_when_its_status_says_so() -> None:
    """execute_run_iterator 收尾时重读状态：CANCELING 的失败记作 CANCELED。"""
    source = inspect.getsource(execution_api.job_execution_iterator)
    assert source.count("reloaded_run.status == DagsterRunStatus.CANCELING") == 3


def test_lean_storages_override_what_exists() -> None:
    for lean, stock in ((LeanRunStorage, PostgresRunStorage), (LeanEventLogStorage, PostgresEventLogStorage)):
        own = {name for name, value in vars(lean).items() if inspect.isfunction(value)} - {"__init__"}
        of_events = {
            "deferring", "flush", "_give_up", "_insert_waiting", "_record_waiting", "_replace", "_leave_unrecorded", "_insert", "_record",
            "_update_assets", "_flush_made", "_remember", "_joined", "_with_observation", "_with_observations",
        }  # fmt: skip
        assert own - set(dir(stock)) == (of_events if lean is LeanEventLogStorage else set())
        for name in own & set(dir(stock)):
            assert parameters(getattr(lean, name)) == parameters(getattr(stock, name))


_IN_ONE = {"storage": {"postgres": {"postgres_url": "postgresql://host/in_one"}}}
_IN_THREE = {
    f"{part}_storage": {
        "module": f"dagster_postgres.{part}_storage" if part != "event_log" else "dagster_postgres.event_log",
        "class": f"Postgres{kind}Storage",
        "config": {"postgres_url": "postgresql://host/in_three"},
    }
    for part, kind in (("run", "Run"), ("event_log", "EventLog"), ("schedule", "Schedule"))
}


@pytest.mark.parametrize(
    ("document", "url"), [(_IN_ONE, "postgresql://host/in_one"), (_IN_THREE, "postgresql://host/in_three")]
)
def test_worker_takes_its_own_storage_wherever_dagster_yaml_names_postgres(
    tmp_path: Path, document: dict[str, object], url: str
) -> None:
    (tmp_path / "dagster.yaml").write_text(json.dumps(document | {"telemetry": {"enabled": False}}))
    data = dagster_instance._with_lean_storage(InstanceRef.from_dir(str(tmp_path))).storage_data
    assert data is not None
    assert (data.module_name, data.class_name, data.config_dict) == (
        LeanStorage.__module__,
        LeanStorage.__name__,
        {"postgres_url": url},
    )


def test_worker_leaves_another_storage_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(json.dumps({"storage": {"sqlite": {"base_dir": str(tmp_path)}}}))
    ref = InstanceRef.from_dir(str(tmp_path))
    assert dagster_instance._with_lean_storage(ref) == ref


def test_versions_of_upstream_assets_are_all_that_a_step_reads_of_them() -> None:
    """LeanEventLogStorage 给出的资产记录只有最近的物化，没有物化的给出最近的观察；谁还读别的，就在这里看见。"""
    assert isinstance(inspect.getattr_static(PostgresEventLogStorage, "asset_records_have_last_observation"), property)
    source = inspect.getsource(DataVersionCache)
    assert source.count("get_asset_records(") == source.count("get_latest_tags_by_partition(") == 1
    read = set(re.findall(r"asset_record\.asset_entry\.(\w+)", source))
    assert read == {"last_materialization_record", "last_observation_record"}


def test_stock_event_log_stores_an_event_in_these_steps() -> None:
    """LeanEventLogStorage 的 _insert 与 _record 照着它写，省去的只有通知；它变了就要再看一遍。"""
    source = inspect.getsource(PostgresEventLogStorage.store_event)
    steps = (
        "prepare_insert_event",
        "NOTIFY",
        "_store_asset_event_tags",
        "_store_asset_event(",
        "store_asset_check_event",
    )
    positions = [source.index(step) for step in steps]
    assert positions == sorted(positions)


def test_stock_run_storage_keeps_the_status_of_a_run_like_this() -> None:
    """LeanRunStorage 写状态只写列：读的人要信列；除此以外它该写的就这几样。"""
    source = inspect.getsource(SqlRunStorage._row_to_run)
    for step in (
        'run = deserialize_value(row["run_body"], DagsterRun)',
        'DagsterRunStatus(row["status"])',
        "return run.with_status(status)",
    ):
        assert step in source
    source = inspect.getsource(SqlRunStorage.handle_run_event)
    written = re.findall(r'kwargs\["(\w+)"\]|^ {20}(\w+)=', source, re.MULTILINE)
    assert {column or value for column, value in written} == {
        "start_time",
        "end_time",
        "run_body",
        "status",
        "update_timestamp",
    }


def test_stock_run_storage_adds_a_run_like_this() -> None:
    """LeanRunStorage._core_add_run：运行，再是它的标签；已经有了的抛同样的错。"""
    source = inspect.getsource(SqlRunStorage._core_add_run)
    for step in (
        "RunsTable.insert().values(**col_values)",
        "raise DagsterRunAlreadyExists",
        "dict(run_id=run_id, key=k, value=v)",
    ):
        assert step in source
    assert "_has_snapshot_id(" in inspect.getsource(SqlRunStorage.has_job_snapshot)
    assert "get_execution_plan_snapshot(" in inspect.getsource(SqlRunStorage.has_execution_plan_snapshot)


def test_dagster_reads_a_run_as_soon_as_it_has_moved_it() -> None:
    """LeanRunStorage 把改状态的语句读出的那一行留给紧接着的这一次。"""
    source = inspect.getsource(EventMethods.handle_new_event)
    moved, read = (
        source.index("self._run_storage_impl.handle_run_event("),
        source.index("run = self._instance.get_run_by_id(run_id)"),
    )
    assert 0 < read - moved < 200


def test_everything_that_reads_events_connects_in_one_place() -> None:
    """LeanEventLogStorage._connect 在读之前写下攒着的物化。"""
    for connection in (PostgresEventLogStorage.run_connection, PostgresEventLogStorage.index_connection):
        assert inspect.getsource(connection).count("return self._connect()") == 1
    assert inspect.getsource(PostgresEventLogStorage._connect).count("return create_pg_connection(self._engine)") == 1


def test_stock_run_storage_finds_a_run_with_these_columns() -> None:
    source = inspect.getsource(SqlRunStorage.get_run_records)
    read = set(re.findall(r'row\["(\w+)"\]', source))
    assert read == {"id", "create_timestamp", "update_timestamp", "start_time", "end_time"}


def test_stock_event_log_writes_the_records_of_checks_on_the_index_connection() -> None:
    """LeanEventLogStorage 把它们与别的攒成一条消息：结果只看改到了没有，而计划的那一行总在。"""
    for write in (
        SqlEventLogStorage._store_asset_check_evaluation_planned,
        SqlEventLogStorage._update_asset_check_evaluation,
    ):
        assert "with self.index_connection() as conn:" in inspect.getsource(write)
    source = inspect.getsource(SqlEventLogStorage._update_asset_check_evaluation)
    assert source.count("conn.execute(") == source.count(").rowcount") == 2
    assert "if rows_updated == 0:" in source


def test_dagster_remembers_every_run_that_wrote_an_event_and_a_worker_does_not() -> None:
    @asset
    def thing() -> None: ...

    with DagsterInstance.ephemeral() as instance:
        assert materialize([thing], instance=instance).success
        assert len(instance._subscribers) == 1
        instance._subscribers = dagster_instance._NoSubscribers()
        assert materialize([thing], instance=instance).success
        assert instance._subscribers == {}


def test_stock_event_log_updates_an_asset_like_this() -> None:
    source = inspect.getsource(PostgresEventLogStorage._store_asset_event)
    for step in (
        "self._get_asset_entry_values(\n            event, event_id, self.has_secondary_index(ASSET_KEY_INDEX_COLS)",
        "asset_key=event.dagster_event.asset_key.to_string(),\n            **values",
        "index_elements=[AssetKeyTable.c.asset_key],\n                set_=dict(**values)",
        "on_conflict_do_nothing()",
    ):
        assert step in source


def test_storages_keep_their_engine_where_the_pool_is_put() -> None:
    for storage in (PostgresRunStorage, PostgresEventLogStorage, PostgresScheduleStorage):
        assert "self._engine = " in inspect.getsource(storage.__init__)
    assert parameters(create_pg_engine) == {"postgres_url", "token_provider", "engine_kwargs"}


def test_our_webserver_does_what_the_command_of_dagster_does() -> None:
    """bridge.warm_dagster.webserver 照着 dagster_webserver.cli 的 dagster_webserver 写：缺省值、先后、每一步的参数。"""
    defaults = {parameter.name: parameter.default for parameter in webserver_cli.dagster_webserver.params}
    assert defaults["db_statement_timeout"] == webserver._STATEMENT_TIMEOUT_MILLISECONDS
    assert defaults["db_pool_recycle"] == webserver._POOL_RECYCLE_SECONDS
    assert defaults["db_pool_max_overflow"] == webserver._POOL_MAX_OVERFLOW
    assert defaults["live_data_poll_rate"] == webserver._LIVE_DATA_POLL_MILLISECONDS
    source = inspect.getsource(webserver_cli)
    steps = (
        "instance.optimize_for_webserver(",
        "WorkspaceProcessContext(",
        "create_app_from_workspace_process_context(",
        "uvicorn.run(",
    )
    assert all(step in source for step in steps)
    assert {"live_data_poll_rate"} <= parameters(webserver.create_app_from_workspace_process_context)
    assert {"instance", "workspace_load_target", "version"} <= parameters(webserver.WorkspaceProcessContext.__init__)
    assert {"statement_timeout", "pool_recycle", "max_overflow"} <= parameters(DagsterInstance.optimize_for_webserver)


def test_our_daemon_does_what_the_command_of_dagster_does() -> None:
    """bridge.warm_dagster.daemon 照着 dagster._daemon.cli 的 run 写。"""
    source = inspect.getsource(daemon_cli)
    steps = (
        "setup_interrupt_handlers()",
        "stack.enter_context(capture_interrupts())",
        "daemon_controller_from_instance(\n        instance,\n        workspace_load_target=",
        "controller.check_daemon_loop()",
        "except KeyboardInterrupt:",
    )
    assert all(step in source for step in steps)
    wanted = {"instance", "workspace_load_target", "log_format", "heartbeat_tolerance_seconds"}
    assert wanted <= parameters(daemon.daemon_controller_from_instance)
