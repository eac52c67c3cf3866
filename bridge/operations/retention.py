"""`etl doctor` 说保留期：现在会清掉什么、上次何时清完，一年要多少磁盘。只看；都是有界的查询。"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from bridge.operations.findings import Finding
from bridge.settings import BridgeSettings
from bridge.warm_dagster.old_runs import dagster_database, prune_dagster
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import transact
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import APPLICATION_SCHEMA
from etl_assets.ledger.pruning import last_finished, runs_in_use

_LONG_SINCE = timedelta(days=2)
_COUNTING_SECONDS = 2.0
_MIB, _GIB = 1 << 20, 1 << 30
_BOOKKEEPING = ("import_events", "import_requests")


def look_at_retention(engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings) -> Iterator[Finding]:
    """:raises EtlError: DAGSTER_POSTGRES_URL 设了却连不上。"""
    url = os.environ.get("DAGSTER_POSTGRES_URL")
    if not url:
        yield Finding("retention", "warning", "DAGSTER_POSTGRES_URL is not set here, see `etl env`: not looked at")
        return
    finished = transact(engine, last_finished)
    with dagster_database(url) as database, translated_errors():
        yield _would_go(engine, database, bridge_settings, finished)
        yield _year(engine, database, settings, bridge_settings)


def _would_go(
    engine: sa.Engine, database: sa.Engine, bridge_settings: BridgeSettings, finished: datetime | None
) -> Finding:
    """过了保留期的运行与记录；数不完就说到此为止。"""
    before = datetime.now(UTC) - timedelta(days=bridge_settings.retention_runs_days)
    wanted = transact(engine, runs_in_use)
    counted: Counter[str] = Counter()
    deadline = time.monotonic() + _COUNTING_SECONDS
    least = ""
    for bite in prune_dagster(database, before=before, wanted=wanted, dry_run=True):
        counted += bite
        if time.monotonic() > deadline:
            least = "at least "
            break
    what = f"{least}{counted['runs']:,} runs and {counted['ticks']:,} ticks are older than {bridge_settings.retention_runs_days} days"
    says = f"{what} and would be deleted now; the nightly job last ended {f'{finished:%Y-%m-%d %H:%M %Z}' if finished else 'never'}"
    is_late = counted.total() > 0 and (finished is None or datetime.now(UTC) - finished > _LONG_SINCE)
    if is_late:
        return Finding("retention", "warning", f"{says}: is a worker running? `etl prune` does it now")
    return Finding("retention", "ok", says)


def _year(engine: sa.Engine, database: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings) -> Finding:
    """以后一年照最近一周来：原始数据与结果一直长，别的长到保留期为止。"""
    with engine.connect() as connection:
        schemas = {"application": APPLICATION_SCHEMA, "target": settings.target_schema, "kept_for": list(_BOOKKEEPING)}
        data, bookkeeping, imports, known = connection.execute(_SIZES, schemas).one()
        imports_a_day = float(connection.scalar(_IMPORTS_A_DAY) or 0)
    with database.connect() as connection:
        stored, runs = connection.execute(_DAGSTER_SIZE).one()
        runs_a_day = float(connection.scalar(_RUNS_A_DAY) or 0)
    a_year = data / max(imports, 1) * imports_a_day * 365
    of_runs = stored / max(runs, 1) * runs_a_day * bridge_settings.retention_runs_days
    of_ledger = bookkeeping / max(known, 1) * imports_a_day * settings.retention_ledger_days
    return Finding(
        "disk a year",
        "ok",
        f"at {imports_a_day:,.1f} imports and {runs_a_day:,.1f} runs a day (last 7 days): raw data and results {_size(a_year)} more each "
        f"year (now {_size(data)}); Dagster's runs stay at about {_size(of_runs)} (now {_size(stored)}), the ledger's bookkeeping at "
        f"{_size(of_ledger)} (now {_size(bookkeeping)})",
    )


def _size(number: float) -> str:
    return f"{number / _GIB:.1f} GiB" if number >= _GIB else f"{number / _MIB:.0f} MiB"


# 表的大小与行数由服务器记着，不数
_SIZES = sa.text("""
    WITH tables AS (
        SELECT schemaname, relname, pg_total_relation_size(relid) AS size, n_live_tup AS rows FROM pg_stat_user_tables
        WHERE schemaname IN ('etl', :application, :target)
    )
    SELECT coalesce(sum(size) FILTER (WHERE relname <> ALL (:kept_for)), 0)::float8 AS data,
           coalesce(sum(size) FILTER (WHERE relname = ANY (:kept_for)), 0)::float8 AS bookkeeping,
           coalesce(max(rows) FILTER (WHERE schemaname = :application AND relname = 'import_tasks'), 0) AS imports,
           coalesce(max(rows) FILTER (WHERE relname = 'import_events'), 0) AS known
    FROM tables""").bindparams(sa.bindparam("kept_for", type_=sa.ARRAY(sa.Text)))
_IMPORTS_A_DAY = sa.text("""
    SELECT count(*) / greatest(1, least(7, extract(epoch FROM now() - min(completed_at)) / 86400)) FROM (
        SELECT completed_at FROM public.import_tasks
        WHERE status = 'completed' AND completed_at BETWEEN now() - interval '7 days' AND now() ORDER BY completed_at DESC LIMIT 100000
    ) AS recent""")
_DAGSTER_SIZE = sa.text("""
    SELECT coalesce(sum(pg_total_relation_size(relid)), 0)::float8, coalesce(max(n_live_tup) FILTER (WHERE relname = 'runs'), 0)
    FROM pg_stat_user_tables WHERE schemaname = current_schema()""")
# 编号是连着给的：一周前的那个与最新的那个之间，就是这一周的
_RUNS_A_DAY = sa.text("""
    SELECT ((SELECT max(id) FROM runs) - first.id + 1)
           / greatest(1, extract(epoch FROM (now() AT TIME ZONE 'UTC') - first.update_timestamp) / 86400)
    FROM (
        SELECT id, update_timestamp FROM runs
        WHERE status = 'SUCCESS' AND update_timestamp >= (now() AT TIME ZONE 'UTC') - interval '7 days'
        ORDER BY update_timestamp LIMIT 1
    ) AS first""")
