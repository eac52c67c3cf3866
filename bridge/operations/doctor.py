"""`etl doctor` 看的每一项：是什么样，不对的该怎么办。只看，不改。"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.operations.findings import Finding
from bridge.operations.overview import look_at_disk
from bridge.operations.queues import look_at_newest_event, look_at_queues, look_at_server
from bridge.operations.retention import look_at_retention
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import check_dagster_database
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import EtlError
from etl_assets.core.poolers import is_pooled
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.named_orders import SCATTERED_REMEDY
from etl_assets.ledger.troubles import recent_troubles, troubles_of_imports
from etl_assets.migrations.upgrade import MINIMUM_SERVER_VERSION, missing_migrations
from etl_assets.orders import lost_rows
from etl_assets.reports import health, reports, surroundings
from etl_assets.reports.lookups import find_index_work
from etl_assets.reports.readiness import assert_usable, assert_writable
from etl_assets.services.copy_out import driver_of
from etl_assets.services.table_checks import count_violations

_WAITS_LONG = timedelta(minutes=1)
_MOST_SKEW = timedelta(seconds=2)


def examine(
    engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, *, state_dir: Path
) -> Iterator[Finding]:
    """逐项看过去；服务器不在的，靠它的那些项不看。"""
    yield _free_disk(state_dir)
    has_database = yield from _attempts("postgres", lambda: [_server(engine)])
    has_nats = yield from _attempts("nats", lambda: asyncio.run(look_at_server(bridge_settings)))
    if has_database:
        yield from _attempts("surroundings", lambda: _surroundings(engine, settings))
        has_schema = yield from _attempts("schema", lambda: [_schema(engine, settings)])
        yield from _attempts("dagster", lambda: [_dagster_home()])
        if has_schema:
            yield from _attempts("indexes", lambda: _indexes(engine, settings))
            yield from _attempts("ledger", lambda: _ledger(engine, settings))
            yield from _attempts("order ids", lambda: _order_ids(engine, settings))
            yield from _attempts("retention", lambda: look_at_retention(engine, settings, bridge_settings))
            yield from _attempts("side tasks", lambda: _side_tasks(engine))
            yield from _attempts("table checks", lambda: _tables(engine, settings))
    if has_nats:
        yield from _attempts("queues", lambda: asyncio.run(look_at_queues(bridge_settings)))
        if has_database:
            yield from _attempts("newest event", lambda: look_at_newest_event(engine, settings, bridge_settings))


def _attempts(check: str, look: Callable[[], Iterable[Finding]]) -> Generator[Finding, None, bool]:
    """看不下去的也是一项发现，不耽误别的。返回是不是没有错。"""
    try:
        with translated_errors():
            # 在这里就走完：生成器拖到外面才走，错也在外面抛，没有人翻译它
            findings = list(look())
    except EtlError as error:
        findings = [Finding(check, "error", str(error))]
    yield from findings
    return all(finding.state != "error" for finding in findings)


# ---- 服务器 -------------------------------------------------------------------------


def _free_disk(state_dir: Path) -> Finding:
    disk = look_at_disk(state_dir)
    says = f"{disk.free_bytes / (1 << 30):.1f} GiB free at {disk.folder}"
    return (
        Finding("disk", "warning", f"{says}: free some space") if disk.is_nearly_full else Finding("disk", "ok", says)
    )


def _server(engine: sa.Engine) -> Finding:
    with engine.connect() as connection:
        number, version = connection.execute(
            sa.text("SELECT current_setting('server_version_num')::int, current_setting('server_version')")
        ).one()
        if number < MINIMUM_SERVER_VERSION:
            return Finding(
                "postgres", "error", f"version {version}: upgrade to {MINIMUM_SERVER_VERSION // 10000} or newer"
            )
        assert_writable(connection)
    return Finding("postgres", "ok", f"version {version}")


def _surroundings(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    with engine.connect() as connection:
        skew = surroundings.clock_skew(connection)
        pooled = is_pooled(driver_of(connection))
        hidden = surroundings.tables_with_row_security(connection, settings)
        unanalyzed = surroundings.tables_without_statistics(connection, settings)
    says = (
        f"this host is {abs(skew.total_seconds()):.1f} s {'ahead of' if skew > timedelta() else 'behind'} the database"
    )
    if abs(skew) > _MOST_SKEW:
        yield Finding("clock", "warning", f"{says}: let both follow the same time server (NTP)")
    else:
        yield Finding("clock", "ok", says)
    if pooled:
        yield Finding("pooler", "ok", "a connection pooler is between us and PostgreSQL, it pools by session")
    if hidden:
        yield Finding(
            "row security",
            "error",
            f"row-level security is on for our role on {', '.join(hidden)}: rows that it hides look deleted, and their orders would be "
            "deleted, so runs are refused; `ALTER ROLE … BYPASSRLS`, or a policy FOR ALL USING (true) for our role",
        )
    if unanalyzed:
        yield Finding("statistics", "warning", f"never analyzed: run `ANALYZE {', '.join(unanalyzed)}`")


def _schema(engine: sa.Engine, settings: EtlSettings) -> Finding:
    if missing := missing_migrations(engine):
        return Finding(
            "schema", "error", f"{len(missing)} migrations are missing ({', '.join(missing)}): run `etl init-db`"
        )
    transact(engine, assert_usable, settings.target_schema)
    return Finding("schema", "ok", f"the tables in {settings.target_schema} match the contract")


def _indexes(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    """应用自己建的表上，ETL 的查找有没有索引走得成。"""
    found = transact(engine, find_index_work, settings)
    for work in found:
        yield Finding(f"index {work.lookup.index.name}", "warning", work.says, fix="indexes")
    if not found:
        yield Finding("indexes", "ok", "every lookup of an event and of a run is served by one")


def _dagster_home() -> Finding:
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        return Finding("dagster", "warning", "DAGSTER_HOME is not set here: workers need it, see `etl env`")
    if not (Path(home) / "dagster.yaml").exists():
        return Finding(
            "dagster", "error", f"there is no dagster.yaml in DAGSTER_HOME ({home}): start `etl up` once, or write one"
        )
    if url := os.environ.get("DAGSTER_POSTGRES_URL"):
        check_dagster_database(url)
    return Finding("dagster", "ok", f"dagster {importlib.metadata.version('dagster')}, {home}")


# ---- 台账与表 -----------------------------------------------------------------------


def _ledger(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    with engine.connect() as connection:
        held = reports.held_days(connection, settings)
        silent = health.unannounced_imports(connection, settings)
        unasked = lost_rows.unasked_days(connection, settings)
        nowhere = lost_rows.rows_nowhere(connection, settings)
        waiting = reports.count_waiting_events(connection, settings)
        aside = reports.set_aside_events(connection)
    if waiting.oldest is not None and datetime.now(UTC) - waiting.oldest > _WAITS_LONG:
        yield Finding(
            "waiting events",
            "warning",
            f"{waiting.events:,} events wait for imports that are not completed in import_tasks, the oldest since {waiting.oldest}; "
            "each is dead-lettered ETL_EVENT_RETRY_SECONDS after it was published: do the imports commit?",
        )
    if aside.events:
        yield Finding(
            "completion events",
            "warning",
            f"{aside.events:,} cannot be published and are tried again every ten minutes: {aside.problem}",
        )
    if held:
        first = held[0]
        yield Finding(
            "held days",
            "warning",
            f"{first['day']} of {first['asset']} is held ({first['held_reason']}); see `etl status`",
        )
    if silent:
        yield Finding(
            "announced imports",
            "error",
            f"{len(silent)} completed imports are not in the ledger and the listener does not take them in by itself (it was not running, "
            f"or completed_at is empty, or more than an hour off, or before the first start), the oldest is {silent[0]}: `etl replay`, "
            f"or `etl publish {DATA_IMPORT_COMPLETED}` for each",
            fix="announcements",
        )
    for check, found, problem in (
        ("ledger", unasked, "raw rows lie on days that the ledger was never asked for"),
        ("tables", nowhere, "raw rows of days that the ledger calls done are neither in orders nor rejected"),
    ):
        if found:
            remedy = (
                f"was a backup restored? `etl backfill --from {found.first} --to {found.last}` makes these days again"
            )
            yield Finding(check, "error", f"{found.rows:,} {problem} ({found.first} to {found.last}): {remedy}")
    if not (held or silent or unasked or nowhere):
        yield Finding("ledger", "ok", "every raw row is accounted for")


def _side_tasks(engine: sa.Engine) -> Iterator[Finding]:
    """进程旁边的活（对账、补发……）最近一小时里无故结束过没有。"""
    found = transact(engine, recent_troubles)
    for trouble in found:
        says = f"'{trouble['task']}' of {trouble['process']} ended {trouble['times']} times, the last at {trouble['last_at']:%H:%M:%S %Z}"
        remedy = "it was started again; if it goes on, look into the log of that process and report it"
        yield Finding("side tasks", "error", f"{says} ({trouble['message']}): {remedy}")
    if not found:
        yield Finding("side tasks", "ok", "none has ended in the last hour")


def _order_ids(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    """占位的订单号：收导入时看出来的。"""
    for said in transact(engine, troubles_of_imports, settings.target_schema):
        yield Finding("order ids", "warning", f"{said}: {SCATTERED_REMEDY}")


def _tables(engine: sa.Engine, settings: EtlSettings) -> Iterator[Finding]:
    wrong = [
        f"{asset} {name} ({violations:,})"
        for asset in descriptions()
        for name, violations in count_violations(engine, settings, asset, None).items()
        if violations
    ]
    remedy = "make the days again with `etl backfill`; if it stays, something else writes these tables"
    yield (
        Finding("table checks", "error", f"{', '.join(wrong)}: {remedy}")
        if wrong
        else Finding("table checks", "ok", "all pass")
    )
