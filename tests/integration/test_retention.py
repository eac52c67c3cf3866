"""过了保留期的每天清一次：还用得着的一样不少，旧的没了，一口一口有界，死在半路不留下坏的，一次只有一个在清。"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from dagster import AssetKey
from dagster._core.storage.partition_status_cache import get_and_update_asset_status_cache_value

from bridge.cancelling import cancel_all
from bridge.cli.prune import prune_command
from bridge.errors import NatsUnavailableError
from bridge.events.streams import DEAD_LETTERS
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream, stream_state
from bridge.nats_names import EVENTS_DLQ_STREAM
from bridge.operations.retention import look_at_retention
from bridge.runs import retention
from bridge.runs.retention import CLAIM_SECONDS, Pruning, keep_pruning, last_hour, prune, sweep_run_folders
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.side_tasks import start_beside
from bridge.warm_dagster import old_runs
from bridge.warm_dagster.code_location import CodeLocation
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.etl_tables import outbox, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.intake import retention as of_ledger
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.intake.retention import prune_ledger
from etl_assets.ledger.pruning import claim_pruning, last_finished, release_pruning
from etl_assets.reports.health import unannounced_imports
from etl_assets.reports.progress import import_progress
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .warm_postgres import dagster_on_postgres, warm_postgres_worker
from .warm_runs import announce, submit

ASSETS = ("orders", "customers", "leads")
DAYS = (date(2026, 1, 5), date(2026, 1, 6))
LONG_AGO = timedelta(days=400)

Prune = Callable[..., Counter[str] | None]


@pytest.fixture(scope="module")
def dagster_template(
    postgres_url: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """一个已有 Dagster 的表的模板：升级它们要几秒，一个模块只做一次。"""
    with cloned_database(postgres_url, database_template) as url:
        engine = build_engine(EtlSettings(database_url=url))
        with dagster_on_postgres(engine, tmp_path_factory.mktemp("template")):
            pass
        engine.dispose()
        yield str(engine.url.database)


@pytest.fixture
def etl_settings(postgres_url: str, dagster_template: str) -> Iterator[EtlSettings]:
    with cloned_database(postgres_url, dagster_template) as url:
        yield EtlSettings(database_url=url)


@pytest.fixture
def worker(location: CodeLocation, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> Iterator[RunWorker]:
    with warm_postgres_worker(location, engine, etl_settings, tmp_path) as worker:
        yield worker


@pytest.fixture
def prune_now(worker: RunWorker, nats_server: NatsServer) -> Prune:
    """清一次，像 `etl prune`。"""

    def run(**options: Any) -> Counter[str] | None:
        return asyncio.run(_prune(worker, BridgeSettings(nats_url=nats_server.url), options))

    return run


async def _prune(worker: RunWorker, settings: BridgeSettings, options: dict[str, Any]) -> Counter[str] | None:
    url = worker.instance.run_storage.postgres_url  # type: ignore[attr-defined]  # 存储是 PostgreSQL 的
    async with JetStreamConnection(settings, name="prune") as connection:
        return await prune(Pruning(worker.engine, worker.settings, settings, connection, url), **options)


def make(worker: RunWorker, raw_data: RawData, day: date = DAYS[0]) -> str:
    """一个事件要的运行，做到了底；返回它的编号。"""
    at = datetime.combine(day, datetime.min.time(), UTC) + timedelta(hours=4)
    announce(worker.engine, worker.settings, raw_data.add_import([{"order_id": f"A-{day}", "ordered_at": at}]))
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    assert worker.execute(held).succeeded
    return held.run.run_id


def execute(engine: sa.Engine, statement: str, **given: object) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement), given)


def age_runs(engine: sa.Engine, *run_ids: str) -> None:
    """这些运行是很久以前的。"""
    execute(
        engine,
        """UPDATE dagster.runs SET create_timestamp = create_timestamp - :by, update_timestamp = update_timestamp - :by
           WHERE run_id = ANY (:run_ids)""",
        by=LONG_AGO,
        run_ids=list(run_ids),
    )


def age_imports(engine: sa.Engine) -> None:
    """台账里的全部导入是很久以前的，此后监听器一直看着。"""
    execute(engine, "UPDATE etl.import_events SET handled_at = handled_at - :by", by=LONG_AGO)
    execute(engine, "UPDATE import_tasks SET completed_at = now() - :by WHERE completed_at IS NOT NULL", by=LONG_AGO)
    execute(engine, "INSERT INTO etl.import_watches VALUES ('public', now() - :by * 2, now())", by=LONG_AGO)


def count(engine: sa.Engine, table: str, where: str = "true") -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {where}").scalar_one())  # noqa: S608  # 只有测试里的文字


def newest(worker: RunWorker) -> dict[str, dict[str, str]]:
    """每个资产的每个分区最新的物化是哪个运行写的，照 Dagster 说的。"""
    found: dict[str, dict[str, str]] = {asset: {} for asset in ASSETS}
    for asset in ASSETS:
        for record in worker.instance.fetch_materializations(AssetKey(asset), limit=1_000).records:  # 新的在前
            found[asset].setdefault(str(record.partition_key), record.run_id)
    return found


def run_ids(worker: RunWorker) -> list[str]:
    """网页上的运行，新的在前。"""
    return [record.dagster_run.run_id for record in worker.instance.get_run_records(limit=100)]


def event_types(worker: RunWorker, run_id: str) -> Counter[str]:
    entries = worker.instance.all_logs(run_id)
    return Counter(entry.dagster_event.event_type_value for entry in entries if entry.dagster_event)


# ---- Dagster 的运行 -------------------------------------------------------------------


def test_newest_materialization_of_each_partition_stays_with_its_run_and_the_others_go(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    old = [make(worker, raw_data, day) for day in (*DAYS, *DAYS)]
    young = make(worker, raw_data, DAYS[0])
    age_runs(worker.engine, *old)
    before = newest(worker)
    assert before["orders"] == {"2026-01-05": young, "2026-01-06": old[3]}
    checks = [
        key for key in worker.location.repository.asset_graph.asset_check_keys if key.asset_key == AssetKey("orders")
    ]
    storage = worker.instance.event_log_storage
    shown = storage.get_latest_asset_check_execution_by_key(checks)

    removed = prune_now()

    assert removed is not None
    assert (removed["runs"], removed["check_results"]) == (3, 9)
    assert newest(worker) == before
    assert storage.get_latest_asset_check_execution_by_key(checks) == shown
    assert run_ids(worker) == [young, old[3]]
    assert event_types(worker, old[3]) == {"ASSET_MATERIALIZATION": 3, "ASSET_CHECK_EVALUATION": 3}
    assert event_types(worker, young)["STEP_START"] == 3
    for asset in ASSETS:
        assert storage.get_materialized_partitions(AssetKey(asset)) == {str(day) for day in DAYS}
    assert count(worker.engine, "dagster.asset_event_tags") == 6
    assert count(worker.engine, "dagster.run_tags", f"run_id IN ('{old[0]}', '{old[1]}', '{old[2]}')") == 0
    assert prune_now() == Counter()
    # 它有了更新的，这一次就走了
    make(worker, raw_data, DAYS[1])
    assert (prune_now() or Counter())["runs"] == 1


def test_partitions_page_is_the_same_when_its_cache_is_computed_anew(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    """一天失败了没有人管，一天做成了：很久以后网页上还是这样。"""
    old = [make(worker, raw_data, DAYS[1]), make(worker, raw_data, DAYS[1])]
    failed = submit(worker, "orders", day=str(DAYS[0]))
    held = worker.take(failed)
    assert held is not None
    execute(worker.engine, "ALTER TABLE orders RENAME TO elsewhere")
    assert not worker.execute(held).succeeded
    execute(worker.engine, "ALTER TABLE elsewhere RENAME TO orders")
    age_runs(worker.engine, *old, failed)
    definition = worker.location.repository.assets_defs_by_key[AssetKey("orders")].partitions_def

    def page() -> tuple[set[str], set[str]]:
        execute(worker.engine, "UPDATE dagster.asset_keys SET cached_status_data = NULL")
        value = get_and_update_asset_status_cache_value(worker.instance, AssetKey("orders"), definition)
        assert value is not None
        assert definition is not None
        return (
            set(value.deserialize_materialized_partition_subsets(definition).get_partition_keys()),
            set(value.deserialize_failed_partition_subsets(definition).get_partition_keys()),
        )

    before = page()
    assert before == ({"2026-01-06"}, {"2026-01-05"})
    removed = prune_now()
    assert removed is not None
    assert removed["runs"] == 1
    assert page() == before
    assert run_ids(worker) == [failed, old[1]]


@pytest.mark.parametrize("status", ["QUEUED", "STARTED", "CANCELING", "NOT_STARTED"])
def test_run_that_has_not_ended_stays_however_old(
    worker: RunWorker, raw_data: RawData, prune_now: Prune, status: str
) -> None:
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    execute(worker.engine, "UPDATE dagster.runs SET status = :status WHERE run_id = :old", status=status, old=old)
    events = event_types(worker, old)
    assert prune_now() == Counter()
    assert event_types(worker, old) == events


def test_run_that_a_due_day_goes_on_from_stays(worker: RunWorker, raw_data: RawData, prune_now: Prune) -> None:
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    execute(worker.engine, "UPDATE etl.ledger SET requested = requested + 1, failed_run_id = :old", old=old)
    events = event_types(worker, old)
    assert prune_now() == Counter()
    assert event_types(worker, old) == events
    execute(worker.engine, "UPDATE etl.ledger SET materialized = requested")
    assert (prune_now() or Counter())["runs"] == 1


def test_run_that_a_younger_one_was_retried_from_stays_whole(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    old, again = make(worker, raw_data), make(worker, raw_data)
    make(worker, raw_data)
    age_runs(worker.engine, old)
    execute(
        worker.engine,
        """INSERT INTO dagster.run_tags (run_id, key, value)
           VALUES (:again, 'dagster/parent_run_id', :old), (:again, 'dagster/root_run_id', :old)""",
        again=again,
        old=old,
    )
    events = event_types(worker, old)
    assert prune_now() == Counter()
    assert event_types(worker, old) == events
    # 重来的也旧了：先是它，下一次是它的来处
    age_runs(worker.engine, again)
    assert (prune_now() or Counter())["runs"] == 1
    assert (prune_now() or Counter())["runs"] == 1
    assert len(run_ids(worker)) == 1


def test_runs_of_a_backfill_stay_until_it_is_done_then_it_goes_with_them(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    execute(worker.engine, "UPDATE dagster.runs SET backfill_id = 'fill' WHERE run_id = :old", old=old)
    execute(
        worker.engine,
        "INSERT INTO dagster.bulk_actions (key, status, timestamp, body) VALUES ('fill', 'REQUESTED', now() - :by, '')",
        by=LONG_AGO,
    )
    events = event_types(worker, old)
    assert prune_now() == Counter()
    assert event_types(worker, old) == events
    execute(worker.engine, "UPDATE dagster.bulk_actions SET status = 'COMPLETED_SUCCESS'")
    removed = prune_now()
    assert removed is not None
    assert (removed["runs"], removed["backfills"]) == (1, 1)


def test_newest_tick_of_each_sensor_stays(worker: RunWorker, prune_now: Prune) -> None:
    execute(
        worker.engine,
        """INSERT INTO dagster.job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body)
           SELECT sensor, sensor, 'SKIPPED', 'SENSOR', now() - :by + n * interval '1 minute', ''
           FROM unnest(ARRAY['a', 'b']) sensor, generate_series(1, 2000) n""",
        by=LONG_AGO,
    )
    assert prune_now() == Counter(ticks=3_998)
    assert count(worker.engine, "dagster.job_ticks") == 2


def test_bites_are_bounded_and_what_dies_between_two_is_finished_by_the_next(
    worker: RunWorker, raw_data: RawData, prune_now: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """一口删到一半就死了：网页上还是对的，旧的运行下一次接着删完。"""
    monkeypatch.setattr(old_runs, "RUNS_PER_BITE", 2)
    monkeypatch.setattr(old_runs, "EVENTS_PER_BITE", 10)
    old = [make(worker, raw_data) for _ in range(3)]
    young = make(worker, raw_data)
    age_runs(worker.engine, *old)
    shown = newest(worker)
    url = worker.instance.run_storage.postgres_url  # type: ignore[attr-defined]
    total = count(worker.engine, "dagster.event_logs")
    with old_runs.dagster_database(url) as database:
        bites = old_runs.prune_dagster(
            database, before=datetime.now(UTC) - timedelta(days=30), wanted=[], dry_run=False
        )
        for number in range(1, 4):
            assert next(bites) == Counter(run_events=10)
            assert count(worker.engine, "dagster.event_logs") == total - 10 * number
        bites.close()  # type: ignore[attr-defined]  # 死了
    assert newest(worker) == shown
    assert set(run_ids(worker)) == {young, *old}
    for run_id in old:
        worker.instance.all_logs(run_id)
    removed = prune_now()
    assert removed is not None
    assert removed["runs"] == 3
    assert run_ids(worker) == [young]
    assert newest(worker) == shown


def test_locked_row_is_not_waited_for_and_the_rest_is_pruned_all_the_same(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    """有人锁着 Dagster 的表：一秒就放手，台账照清，下一次再来；没有清完，今天还会再来。"""
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    age_imports(worker.engine)
    with worker.engine.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE dagster.event_logs IN EXCLUSIVE MODE")
        with pytest.raises(Exception, match="lock timeout"):
            prune_now()
        assert count(worker.engine, "etl.import_events") == 0
        assert count(worker.engine, "etl.retention", "finished_at IS NULL AND claimed_until IS NULL") == 1
    assert (prune_now() or Counter())["runs"] == 1


def test_new_runs_go_on_while_old_ones_are_pruned(worker: RunWorker, raw_data: RawData, prune_now: Prune) -> None:
    old = [make(worker, raw_data, day) for day in DAYS * 3]
    age_runs(worker.engine, *old)
    age_imports(worker.engine)
    done: list[Counter[str] | None] = []
    pruning = threading.Thread(target=lambda: done.append(prune_now()))
    pruning.start()
    new = [make(worker, raw_data, day) for day in DAYS]
    pruning.join()
    assert done[0] is not None
    prune_now()
    assert newest(worker)["orders"] == {"2026-01-06": new[1], "2026-01-05": new[0]}
    assert set(run_ids(worker)) == set(new)


# ---- 一次一个 -------------------------------------------------------------------------


def test_second_job_does_nothing_while_one_is_at_it_or_after_it(
    worker: RunWorker, raw_data: RawData, prune_now: Prune
) -> None:
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    assert transact(worker.engine, claim_pruning, due_since=None, seconds=CLAIM_SECONDS)
    assert prune_now() is None
    assert len(run_ids(worker)) == 2
    transact(worker.engine, release_pruning, is_finished=True)
    assert prune_now(due_since=datetime.now(UTC) - timedelta(hours=1)) is None
    assert len(run_ids(worker)) == 2
    # 死在半路的，过了期别人从头再来
    assert transact(worker.engine, claim_pruning, due_since=None, seconds=0)
    time.sleep(0.01)
    assert prune_now(due_since=datetime.now(UTC) + timedelta(hours=1)) is not None
    assert len(run_ids(worker)) == 1


def test_it_is_due_from_four_in_the_morning_on() -> None:
    zone = ZoneInfo("Asia/Shanghai")
    assert last_hour(datetime(2026, 3, 5, 3, 59, tzinfo=zone), zone) == datetime(2026, 3, 4, 4, tzinfo=zone)
    assert last_hour(datetime(2026, 3, 5, 4, 0, tzinfo=zone), zone) == datetime(2026, 3, 5, 4, tzinfo=zone)


async def test_worker_prunes_by_itself_when_it_is_due_and_only_then(
    engine: sa.Engine, etl_settings: EtlSettings, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LOOK_SECONDS", 0.05)
    settings = BridgeSettings(nats_url=nats_server.url)

    async def finished() -> datetime | None:
        return await asyncio.to_thread(transact, engine, last_finished)

    async with JetStreamConnection(settings, name="prune") as connection:
        beside = start_beside("prune", lambda: keep_pruning(Pruning(engine, etl_settings, settings, connection, None)))
        deadline = time.monotonic() + 30
        while (first := await finished()) is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert await finished() == first
        await asyncio.to_thread(execute, engine, "UPDATE etl.retention SET finished_at = now() - interval '25 hours'")
        while (again := await finished()) is None or again < first:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await cancel_all(beside)


# ---- 台账 ----------------------------------------------------------------------------


def forget(engine: sa.Engine, *, oldest_event: datetime | None = None) -> Counter[str]:
    before = datetime.now(UTC) - timedelta(days=90)
    return sum(prune_ledger(engine, before=before, oldest_event=oldest_event, dry_run=False), Counter())


def requested(engine: sa.Engine, settings: EtlSettings, import_id: UUID, *, is_done: bool = True) -> None:
    announce(engine, settings, import_id)
    if is_done:
        execute(engine, "UPDATE etl.ledger SET requested = 9, materialized = 9")


def test_old_import_is_forgotten_and_still_known_as_done(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    import_id = raw_data.add_import([{}])
    requested(engine, etl_settings, import_id)
    age_imports(engine)
    assert forget(engine) == Counter(import_events=1, import_requests=1)
    with engine.connect() as connection:
        progress = import_progress(connection, etl_settings, import_id)
        assert (progress.handled, progress.days, progress.done) == (True, 0, 0)
        assert unannounced_imports(connection, etl_settings) == []
        # 没有人宣布过的，早于第一次看的、没有写完成时刻的，照样说
    never = raw_data.add_import([{"order_id": "B"}], completed_at=datetime.now(UTC) - 3 * LONG_AGO)
    unknown = raw_data.add_import([{"order_id": "C"}], completed_at=None)
    with engine.connect() as connection:
        assert set(unannounced_imports(connection, etl_settings)) == {str(never), str(unknown)}
        assert not import_progress(connection, etl_settings, never).handled
    # 又来一遍的事件再做一次，没有害处
    assert request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=7)]) == ["requested"]


@pytest.mark.parametrize(
    "why",
    [
        "UPDATE etl.ledger SET materialized = 0 WHERE asset = 'leads'",
        "UPDATE etl.ledger SET materialized = 0, held_reason = 'broken'",
        "UPDATE import_tasks SET completed_at = NULL",
        "UPDATE import_tasks SET completed_at = now()",
        "UPDATE etl.import_events SET handled_at = now()",
        "UPDATE etl.import_watches SET watched_from = now() - interval '1 day'",
        "UPDATE etl.import_watches SET watched_until = now() - interval '500 days'",
        "DELETE FROM etl.import_watches",
    ],
)
def test_import_that_is_still_needed_is_remembered(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, why: str
) -> None:
    requested(engine, etl_settings, raw_data.add_import([{}]))
    age_imports(engine)
    execute(engine, why)
    assert forget(engine) == Counter()
    assert count(engine, "etl.import_requests") == 1


def test_import_whose_event_is_still_in_the_stream_is_remembered(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    requested(engine, etl_settings, raw_data.add_import([{}]))
    age_imports(engine)
    assert forget(engine, oldest_event=datetime.now(UTC) - 2 * LONG_AGO) == Counter()
    assert forget(engine, oldest_event=datetime.now(UTC)) == Counter(import_events=1, import_requests=1)


def test_event_that_comes_while_its_import_is_being_forgotten_is_not_lost(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """看过之后、删之前又宣布了一次：要的日子还在台账里。"""
    import_id = raw_data.add_import([{}])
    requested(engine, etl_settings, import_id)
    age_imports(engine)
    lock = of_ledger.lock_imports

    def announce_first(connection: sa.Connection, target: str, import_ids: Any) -> None:
        announce(engine, etl_settings, import_id)
        lock(connection, target, import_ids)

    monkeypatch.setattr(of_ledger, "lock_imports", announce_first)
    assert forget(engine) == Counter()
    assert (
        count(engine, "etl.import_requests r JOIN etl.ledger l USING (target, day)", "r.revision > l.materialized") == 3
    )


def test_many_imports_are_forgotten_bite_by_bite(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_ledger, "BITE", 2)
    for number in range(5):
        requested(engine, etl_settings, raw_data.add_import([{"order_id": f"A-{number}"}]))
    age_imports(engine)
    bites = list(prune_ledger(engine, before=datetime.now(UTC) - timedelta(days=90), oldest_event=None, dry_run=False))
    assert [bite["import_events"] for bite in bites if bite["import_events"]] == [2, 2, 1]


def test_rejected_rows_and_files_of_imports_that_are_gone_go(engine: sa.Engine, raw_data: RawData) -> None:
    there, gone, without_task = raw_data.add_import([{}]), uuid4(), uuid4()
    with engine.begin() as connection:
        for import_id in (there, gone, without_task):
            connection.execute(
                sa.insert(rejected_rows),
                [
                    {
                        "target": "public",
                        "raw_id": import_id.int % 2**40 + n,
                        "import_id": import_id,
                        "rule": "unknown_shop",
                    }
                    for n in range(3)
                ],
            )
            connection.execute(
                sa.text("INSERT INTO etl.imported_files (import_id, content_hash) VALUES (:id, 'x')"), {"id": import_id}
            )
        connection.execute(
            sa.text("INSERT INTO raw_orders (import_id, order_id) VALUES (:id, 'A')"), {"id": without_task}
        )
    assert forget(engine) == Counter(rejected_rows=3, imported_files=1)
    assert count(engine, "etl.rejected_rows", f"import_id = '{gone}'") == 0
    assert count(engine, "etl.rejected_rows") == 6


def test_completion_event_that_was_never_sent_stays_unless_it_cannot_be(engine: sa.Engine) -> None:
    old = datetime.now(UTC) - LONG_AGO
    rows = [(old, None), (old, "unknown asset"), (datetime.now(UTC), "unknown asset")]
    with engine.begin() as connection:
        connection.execute(
            sa.insert(outbox),
            [
                {"event_id": uuid4(), "asset": "orders", "payload": {}, "created_at": at, "problem": problem}
                for at, problem in rows
            ],
        )
    assert forget(engine) == Counter(completion_events=1)
    assert count(engine, "etl.outbox", "problem IS NULL OR created_at > now() - interval '1 day'") == 2


# ---- NATS、文件、命令 ------------------------------------------------------------------


async def test_only_dead_letters_that_are_old_go(
    engine: sa.Engine, etl_settings: EtlSettings, nats_server: NatsServer
) -> None:
    settings = BridgeSettings(nats_url=nats_server.url)
    async with JetStreamConnection(settings, name="test") as connection:
        await ensure_stream(connection, DEAD_LETTERS)
        for number in range(5):
            await connection.publish("events_dlq.test", b"{}", message_id=str(number))
        pruning = Pruning(engine, etl_settings, settings, connection, None)
        assert await prune(pruning) == Counter()
        cutoff = datetime.now(UTC)
        await connection.publish("events_dlq.test", b"{}", message_id="young")
        count_of_old, following = await retention._letters_before(connection, EVENTS_DLQ_STREAM, cutoff)
        assert (count_of_old, following) == (5, 6)
        await retention.delete_messages_before(connection, EVENTS_DLQ_STREAM, following)
        state = await stream_state(connection, EVENTS_DLQ_STREAM)
        assert state is not None
        assert (state.messages, state.first_seq) == (1, 6)


def test_without_nats_the_ledger_stays_and_dagster_is_pruned(
    worker: RunWorker, raw_data: RawData, nats_server: NatsServer
) -> None:
    """不知道流里还有哪些事件，就一个导入也不忘。"""
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    age_imports(worker.engine)
    url = worker.instance.run_storage.postgres_url  # type: ignore[attr-defined]

    async def without_nats() -> None:
        settings = BridgeSettings(nats_url=nats_server.url)
        async with JetStreamConnection(settings, name="prune") as connection:
            await connection.close()
            await prune(Pruning(worker.engine, worker.settings, settings, connection, url))

    with pytest.raises(NatsUnavailableError):
        asyncio.run(without_nats())
    assert len(run_ids(worker)) == 1
    assert count(worker.engine, "etl.import_events") == 2


def test_old_folders_of_runs_go_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    old, young = (tmp_path / "storage" / str(uuid4()) for _ in range(2))
    others = [tmp_path / "storage" / "schedules", tmp_path / str(uuid4())]
    for folder in (old, young, *others):
        (folder / "compute_logs").mkdir(parents=True)
    long_ago = time.time() - LONG_AGO.total_seconds()
    for folder in (old, *others):
        os.utime(folder, (long_ago, long_ago))
    assert sweep_run_folders(BridgeSettings(nats_url="")) == 1
    assert not old.exists()
    assert all(folder.exists() for folder in (young, *others))


def test_command_counts_first_and_deletes_then(
    worker: RunWorker, raw_data: RawData, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    settings = BridgeSettings(nats_url=nats_server.url)
    use_in_commands(monkeypatch, engine=worker.engine, settings=worker.settings, bridge_settings=settings)
    old, _ = make(worker, raw_data), make(worker, raw_data)
    age_runs(worker.engine, old)
    age_imports(worker.engine)
    would = json.loads(CliRunner().invoke(prune_command, ["--dry-run", "--json"], catch_exceptions=False).output)
    assert (would["dry_run"], would["runs"], would["import_events"]) == (True, 1, 2)
    assert len(run_ids(worker)) == 2
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", worker.instance.run_storage.postgres_url)  # type: ignore[attr-defined]
    would_go, year = look_at_retention(worker.engine, worker.settings, settings)
    assert (would_go.state, year.state) == ("warning", "ok")
    assert would_go.says.startswith("1 runs and 0 ticks are older than 30 days and would be deleted now")
    assert year.says.startswith("at 0.0 imports and 1.0 runs a day")
    did = json.loads(CliRunner().invoke(prune_command, ["--json"], catch_exceptions=False).output)
    assert (did["runs"], did["import_events"], did["import_requests"]) == (1, 2, 2)
    assert len(run_ids(worker)) == 1
    assert [finding.state for finding in look_at_retention(worker.engine, worker.settings, settings)] == ["ok", "ok"]
