"""历史再长，一个事件的一路、网页的一次点击、人看的命令，哪条语句也不把一张表整个读一遍。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from hashlib import md5
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from dagster import DagsterRunStatus

from bridge.alerts.watch import AlertWatch
from bridge.cli.commands import cli
from bridge.operations.doctor import _schema, _server, _side_tasks
from bridge.operations.installation_metrics import Seen, read_database_state
from bridge.operations.retention import look_at_retention
from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from bridge.warm_dagster import old_runs
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.instance import flush_events
from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.intake import retention
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.intake.unannounced_imports import remember_unannounced
from etl_assets.intake.waiting_events import Patience, look_after_waiting_events
from etl_assets.leads.events import LeadChanged, deal_again
from etl_assets.ledger import claims, leases
from etl_assets.ledger.outbox import delete_published, read_unpublished
from etl_assets.reports.reports import newest_imports, oldest_day
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import SAMPLE_SHOP, RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .engine.plans import ExplainedStatement, explained
from .warm_postgres import warm_postgres_worker
from .warm_runs import announce, expire_leases, status, submit

DAYS, IMPORTS, ORDERS, CUSTOMERS, RUNS, OF_BIG_DAY = 3_000, 10_000, 100_000, 25_000, 2_500, 5_000
FIRST = date(2018, 1, 1)
DAY, BIG_DAY = FIRST + timedelta(days=1_234), FIRST + timedelta(days=1_300)
MOST_ROWS = 1_500
"""一天 34 个订单，各是一个客户的，一个客户 4 个；哪张表都有几千行以上，大的那一天也是。"""

# 每次导入 10 行，每天 34 行；都做完了
_SEED = f"""
    CREATE TEMPORARY TABLE history AS
    SELECT n, md5('import ' || n / 10)::uuid AS import_id, 'H-' || n AS order_id, '客户' || n % {CUSTOMERS} AS nickname,
           day, day + time '04:00' AS ordered_at
    FROM generate_series(0, {ORDERS + OF_BIG_DAY - 1}) n,
         LATERAL (SELECT CASE WHEN n < {ORDERS} THEN date '{FIRST}' + n % {DAYS} ELSE date '{BIG_DAY}' END AS day) on_day;
    INSERT INTO import_tasks (import_id, source_name, status, row_count, created_at, completed_at)
    SELECT md5('import ' || n)::uuid, 'history', 'completed', 10, at, at
    FROM generate_series(0, {IMPORTS + OF_BIG_DAY // 10 - 1}) n,
         LATERAL (SELECT timestamptz '2026-01-01' + n * interval '1 minute' AS at) moment;
    INSERT INTO raw_orders (import_id, order_id, shop, customer_name, order_type, order_status, amount, quantity, ordered_at)
    SELECT import_id, order_id, '旗舰店', nickname, '大货订单', 'new', 10, 1, ordered_at FROM history ORDER BY n;
    INSERT INTO orders (shop_id, order_id, customer_nickname, latest_status, raw_order_type, system_order_type, amount, quantity,
                        ordered_at, order_date, import_id, raw_id)
    SELECT '{SAMPLE_SHOP}', order_id, nickname, 'new', '大货订单', 'BULK', 10, 1, ordered_at, day, import_id, raw_id
    FROM history JOIN (SELECT raw_id, order_id FROM raw_orders) AS raw USING (order_id);
    INSERT INTO etl.order_index (target, shop_id, order_id, customer_nickname, customer_key, order_date)
    SELECT 'public', '{SAMPLE_SHOP}', order_id, nickname, '{SAMPLE_SHOP}:' || nickname, day FROM history;
    INSERT INTO customers (customer_global_id, customer_key, shop_id, customer_nickname, first_order_at, last_order_at, order_count,
                           total_amount, sample_count, proof_count, bulk_count, sample_amount, proof_amount, bulk_amount)
    SELECT md5(nickname)::uuid, '{SAMPLE_SHOP}:' || nickname, '{SAMPLE_SHOP}', nickname, min(ordered_at), max(ordered_at), count(*),
           sum(10), 0, 0, count(*), 0, 0, sum(10)
    FROM history GROUP BY nickname;
    INSERT INTO business_leads (lead_id, customer_global_id, lead_no, current_stage, opened_at, last_order_at, sample_count, proof_count,
                                bulk_count, sample_amount, proof_amount, bulk_amount)
    SELECT md5('lead ' || customer_key)::uuid, customer_global_id, 1,
           CASE WHEN last_order_at < date '{FIRST}' + {DAYS - 1} - 90 THEN 'COLD' ELSE 'OPEN' END, first_order_at, last_order_at,
           0, 0, bulk_count, 0, 0, bulk_amount
    FROM customers;
    INSERT INTO etl.cold_sweeps VALUES ('public', date '{FIRST}' + {DAYS - 1} - 90, '100');
    INSERT INTO etl.ledger (target, asset, day, requested, materialized, requested_at, materialized_at, run_id)
    SELECT 'public', asset, date '{FIRST}' + n, 5, 5, at, at, md5('run ' || n)
    FROM generate_series(0, {DAYS - 1}) n, unnest('{{orders,customers,leads}}'::text[]) asset,
         LATERAL (SELECT timestamptz '2026-01-01' + n * interval '1 minute' AS at) moment;
    INSERT INTO etl.import_requests (target, import_id, day, revision) SELECT DISTINCT 'public', import_id, day, 5 FROM history;
    INSERT INTO etl.import_events (target, import_id, event_id, handled_at, stream_sequence)
    SELECT 'public', import_id, import_id, completed_at, row_number() OVER (ORDER BY completed_at) FROM import_tasks;
    INSERT INTO etl.rejected_rows (target, raw_id, import_id, day, rule)
    SELECT 'public', -n, md5('import ' || n / 10)::uuid, date '{FIRST}' + n % {DAYS}, 'unknown_shop'
    FROM generate_series(1, 20000) n;
    INSERT INTO etl.stale_customers (target, asset, customer_key)
    SELECT 'public', asset, customer_key FROM customers, unnest('{{customers,leads}}'::text[]) asset;
    DELETE FROM etl.stale_customers;
    INSERT INTO etl.import_watches VALUES ('public', timestamptz '2026-01-01', timestamptz '2026-02-01');
    DROP TABLE history;
"""  # noqa: S608  # 只有本文件的常量
# 一个真的运行，照样再来几千个
_SEED_RUNS = f"""
    SET search_path TO dagster;
    CREATE TEMPORARY TABLE copies AS
    SELECT md5('run ' || n)::uuid::text AS run_id, (date '{FIRST}' + n)::text AS partition FROM generate_series(0, {RUNS - 1}) n;
    INSERT INTO runs (run_id, snapshot_id, pipeline_name, status, run_body, partition, partition_set, create_timestamp, update_timestamp,
                      start_time, end_time)
    SELECT copies.run_id, snapshot_id, pipeline_name, status, run_body, copies.partition, partition_set, create_timestamp,
           update_timestamp, start_time, end_time
    FROM copies, (SELECT * FROM runs WHERE run_id = %(run_id)s) model;
    INSERT INTO run_tags (run_id, key, value)
    SELECT copies.run_id, key, value FROM copies, (SELECT key, value FROM run_tags WHERE run_id = %(run_id)s) model;
    INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key, partition)
    SELECT copies.run_id, event, dagster_event_type, timestamp, step_key, asset_key, copies.partition
    FROM copies, (SELECT * FROM event_logs WHERE run_id = %(run_id)s
                  AND dagster_event_type IN ('ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED', 'RUN_START', 'RUN_SUCCESS')) model;
    INSERT INTO asset_event_tags (event_id, asset_key, key, value, event_timestamp)
    SELECT event_logs.id, event_logs.asset_key, key, value, event_timestamp
    FROM event_logs, (SELECT DISTINCT ON (asset_key, key) * FROM asset_event_tags) tags
    WHERE tags.asset_key = event_logs.asset_key AND dagster_event_type = 'ASSET_MATERIALIZATION' AND run_id <> %(run_id)s;
    INSERT INTO asset_check_executions (asset_key, check_name, partition, run_id, execution_status, evaluation_event,
                                        evaluation_event_timestamp, evaluation_event_storage_id)
    SELECT asset_key, check_name, copies.partition, copies.run_id, execution_status, evaluation_event, evaluation_event_timestamp,
           evaluation_event_storage_id
    FROM copies, (SELECT * FROM asset_check_executions WHERE run_id = %(run_id)s) model;
    DROP TABLE copies;
    RESET search_path;
"""  # noqa: S608  # 只有本文件的常量


@pytest.fixture(scope="module")
def installation(
    postgres_url: str, database_template: str, location: CodeLocation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunWorker]:
    """一套用了几年的安装，与它的一个工人。"""
    with cloned_database(postgres_url, database_template) as url:
        settings = EtlSettings(database_url=url)
        engine = build_engine(settings)
        with warm_postgres_worker(location, engine, settings, tmp_path_factory.mktemp("installation")) as worker:
            raw_data = RawData(engine)
            with engine.begin() as connection:
                connection.execute(sa.text(_SEED))
            run_id = run_an_event(worker, raw_data)  # 头一次整天做
            with engine.begin() as connection:
                driver: Any = connection.connection.driver_connection
                with driver.cursor() as cursor:
                    for statement in _SEED_RUNS.split(";\n"):
                        cursor.execute(statement, {"run_id": run_id} if "%(run_id)s" in statement else None)
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("ANALYZE")
            yield worker
        engine.dispose()


def run_an_event(worker: RunWorker, raw_data: RawData, **row: Any) -> str:
    """一个事件从收下到发布完成，在那一天已经做过一遍之后；返回它的运行。"""
    at = datetime.combine(BIG_DAY, datetime.min.time(), UTC) + timedelta(hours=5)
    values = {"order_id": f"N-{uuid4()}", "customer_name": "客户77", "ordered_at": at} | row
    announce(
        worker.engine, worker.settings, raw_data.add_import([values], completed_at=datetime(2026, 5, 1, tzinfo=UTC))
    )
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    worker.heartbeat(held.lease)
    flush_events(worker.instance)
    assert worker.execute(held).succeeded
    assert worker.claim() is None
    assert not transact(worker.engine, claims.has_days_in_a_rush, "public")
    with worker.engine.begin() as connection:
        delete_published(connection, [event.outbox_id for event in read_unpublished(connection, limit=100)])
    return held.run.run_id


@contextmanager
def reading_little(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExplainedStatement]]:
    """期间的每条语句，不论谁发的，读的行都只是变了的。"""
    with explained(sa.Engine, monkeypatch) as statements:
        yield statements
    worst = sorted(statements, key=lambda statement: -statement.rows_read_of_tables())
    found = [
        f"{s.rows_read_of_tables()} rows for {s.text}\n{s.plan}" for s in worst if s.rows_read_of_tables() > MOST_ROWS
    ]
    assert statements
    assert not found, "\n\n".join(found)


def raw_data_of(worker: RunWorker) -> RawData:
    """店铺与类型已经有了。"""
    data = RawData.__new__(RawData)
    data._engine = worker.engine
    return data


@pytest.mark.parametrize("row", [{}, {"order_id": "H-1300"}, {"order_id": "H-1300", "customer_name": "客户78"}])
def test_event(installation: RunWorker, monkeypatch: pytest.MonkeyPatch, row: dict[str, str]) -> None:
    with reading_little(monkeypatch) as statements:
        run_an_event(installation, raw_data_of(installation), **row)
    assert any("runs" in statement.text for statement in statements)
    assert any("import_requests" in statement.text for statement in statements)


@pytest.mark.parametrize("kind", ["lead_ids", "customer_global_ids"])
def test_changed_leads(installation: RunWorker, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """一个事件点名五十个客户，他们的日子各不相同：一个运行。"""
    leads = target_tables("public").leads
    column = leads.c.lead_id if kind == "lead_ids" else leads.c.customer_global_id
    with installation.engine.connect() as connection:
        ids = connection.scalars(
            sa.select(column).where(leads.c.lead_no == 1).order_by(leads.c.lead_id).limit(50)
        ).all()
    with reading_little(monkeypatch) as statements:
        with installation.engine.begin() as connection:
            (asked,) = deal_again(connection, installation.settings, [LeadChanged.model_validate({kind: ids})])
        claim = installation.claim(small=True)
        assert claim is not None
        assert (claim.days, claim.assets) == (DayRange(*asked.days, *asked.days), ("leads",))
        assert installation.execute(installation.start(claim)).succeeded
    assert any("business_leads" in statement.text for statement in statements)


def test_withdrawal(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_data = raw_data_of(installation)
    import_id = UUID(hex=f"{0:032x}")
    raw_data.add_import(
        [{"ordered_at": datetime.combine(DAY, datetime.min.time(), UTC)}], status="failed", import_id=import_id
    )
    with reading_little(monkeypatch):
        assert request_imports(
            installation.engine, installation.settings, [ImportEvent(import_id, uuid4(), sequence=9)]
        ) == ["irrelevant"]


def test_click(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    with reading_little(monkeypatch):
        run_id = submit(installation, "orders", "customers", "leads", day=str(DAY))
        held = installation.take(run_id)
        assert held is not None
        assert installation.execute(held).succeeded
    assert status(installation, run_id) is DagsterRunStatus.SUCCESS


def test_click_on_a_range(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """每天的行数、样例与笔数也不读别的日子。"""
    with reading_little(monkeypatch) as statements:
        last_day = str(DAY + timedelta(days=2))
        held = installation.take(submit(installation, "orders", "customers", "leads", day=str(DAY), last_day=last_day))
        assert held is not None
        assert installation.execute(held).succeeded
    assert sum("of_kind" in statement.text for statement in statements) == 3


@pytest.mark.parametrize("asset", ["orders", "customers", "leads"])
def test_click_on_one_asset(installation: RunWorker, monkeypatch: pytest.MonkeyPatch, asset: str) -> None:
    with reading_little(monkeypatch):
        held = installation.take(submit(installation, asset, day=str(DAY)))
        assert held is not None
        assert installation.execute(held).succeeded


def test_what_looks_after_runs_and_events(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, settings = installation.engine, installation.settings
    announce(
        engine,
        settings,
        raw_data_of(installation).add_import([{"ordered_at": datetime.combine(DAY, datetime.min.time(), UTC)}]),
    )
    with reading_little(monkeypatch), engine.connect() as connection:
        assert claims.has_claimable_days(connection, "public")
        leases.leased_run_ids(connection)
        claims.read_overdue_days(connection, "public", timedelta(hours=1))
        oldest_day(connection, "public")
        newest_imports(connection, 20)
        connection.rollback()
        remember_unannounced(engine, settings, handled_until=None)
        look_after_waiting_events(engine, settings, Patience(Backoff(1, 60), limit_seconds=60))
        claim = installation.claim()
        assert claim is not None
        installation.start(claim)
        expire_leases(engine)
        reconcile_runs(installation)
        assert (again := installation.claim()) is not None
        assert installation.execute(installation.start(again)).succeeded


COMMANDS: Sequence[Sequence[str]] = [
    ["status", "--json"],
    ["alerts", "list"],
    ["imports"],
    ["show", "orders"],
    ["show", "orders", "--day", str(DAY)],
    ["show", "customers"],
    ["show", "customers", "--day", str(DAY)],
    ["show", "leads"],
    ["show", "leads", "--day", str(DAY)],
    ["show", "rejected"],
    ["show", "rejected", "--day", str(DAY)],
    ["wait", "--import-id", str(UUID(md5(b"import 5", usedforsecurity=False).hexdigest())), "--timeout", "0"],
    ["why", "order", "H-1300"],
    ["why", "order", "H-1300", "--shop", "旗舰店"],
    ["why", "order", "no such order"],
    ["why", "customer", "客户77"],
    ["why", "lead", str(UUID(md5(f"lead {SAMPLE_SHOP}:客户77".encode(), usedforsecurity=False).hexdigest()))],
    ["why", "import", str(UUID(md5(b"import 5", usedforsecurity=False).hexdigest()))],
    ["why", "day", str(DAY)],
    ["status", "--day", str(BIG_DAY)],
    ["wait", "--import-id", "d5f4d24e-9dd7-4fe0-9c1a-4b6d2f3a0001", "--timeout", "0"],  # 没有这个导入
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_command(
    installation: RunWorker,
    nats_server: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    bridge_settings = BridgeSettings(nats_url=nats_server.url, connect_timeout_seconds=1)
    use_in_commands(
        monkeypatch, engine=installation.engine, settings=installation.settings, bridge_settings=bridge_settings
    )
    with reading_little(monkeypatch):
        result = CliRunner().invoke(cli, arguments)
    assert not result.exception or isinstance(result.exception, SystemExit | PermanentError), result.exception
    assert "Error" not in result.output, result.output
    assert "runs are those that the ledger knows" not in result.output, result.output  # Dagster 的表也读了


async def test_looking_for_what_deserves_an_alert(
    installation: RunWorker, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge_settings = BridgeSettings(nats_url=nats_server.url, alert_urls=("json://127.0.0.1:1",))
    with reading_little(monkeypatch) as statements:
        await AlertWatch(installation.engine, installation.settings, bridge_settings, state_dir=tmp_path).look()
    assert any("alert_watches" in statement.text for statement in statements)
    assert any("percentile_cont" in statement.text for statement in statements)


def test_what_doctor_asks_of_servers(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    with reading_little(monkeypatch):
        assert _server(installation.engine).state == "ok"
        assert _schema(installation.engine, installation.settings).state == "ok"
        list(_side_tasks(installation.engine))


def test_what_is_kept_long_enough_goes_bite_by_bite(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """一口多大由它自己定，不由有多少：只清几口，后面的测试还要它们。"""
    engine, url = installation.engine, installation.instance.run_storage.postgres_url  # type: ignore[attr-defined]
    monkeypatch.setattr(retention, "BITE", 50)
    monkeypatch.setattr(old_runs, "RUNS_PER_BITE", 20)
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", url)
    now = datetime.now(UTC)
    with reading_little(monkeypatch), old_runs.dagster_database(url) as database:
        list(look_at_retention(engine, installation.settings, BridgeSettings(nats_url="")))
        of_ledger = retention.prune_ledger(engine, before=now - timedelta(days=90), oldest_event=None, dry_run=False)
        assert sum(next(of_ledger)["import_events"] for _ in range(3)) > 0
        runs = old_runs.prune_dagster(database, before=now + timedelta(days=1), wanted=[], dry_run=False)
        assert sum(next(runs)["runs"] for _ in range(3)) > 0


def test_scrape(installation: RunWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    with reading_little(monkeypatch):
        transact(installation.engine, read_database_state, installation.settings, seen)
    assert {asset for (asset,) in seen.values["etl_partitions_due"]} == {"orders", "customers", "leads"}
