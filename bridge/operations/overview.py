"""此刻的一切，给 `etl status` 与告警：台账、运行、队列、磁盘。每条语句都有界。一个服务器不在，另一个照看。"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bridge.errors import BridgeError
from bridge.operations.queues import read_queue_depths
from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError
from etl_assets.core.log import redact
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.alerts import checked_alerts, count_unsaid
from etl_assets.ledger.failures import unbalanced_days
from etl_assets.ledger.troubles import recent_troubles, troubles_of_imports
from etl_assets.reports import readiness, reports
from etl_assets.reports.lookups import find_index_work

_LEAST_FREE_BYTES = 1 << 30

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Disk:
    """放着栈的数据的那个磁盘。"""

    folder: str
    free_bytes: int

    @property
    def is_nearly_full(self) -> bool:
        return self.free_bytes < _LEAST_FREE_BYTES


@dataclass(frozen=True)
class Overview:
    """`etl status --json` 就是这些字段。database 与 nats 是它们为什么不让做，None 是没有什么不对；看不到的也是 None。"""

    database: str | None = None
    nats: str | None = None
    ledger: Rows | None = None
    held: Rows | None = None
    running: Rows | None = None
    failed: Rows | None = None
    unbalanced: Rows | None = None
    queues: Rows | None = None
    rejected: Rows | None = None
    troubles: Rows | None = None
    lag: Mapping[str, Any] | None = None
    unpublished_events: int | None = None
    set_aside_events: Mapping[str, Any] | None = None
    waiting_events: Mapping[str, Any] | None = None
    scattered_orders: Sequence[str] | None = None
    indexes: Sequence[str] | None = None
    failed_checks: Rows | None = None
    unsaid_alerts: int | None = None
    disk: Disk | None = None

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "disk": self.disk and vars(self.disk)
        }


def look(engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, *, state_dir: Path) -> Overview:
    """两侧都看，给命令。"""
    overview = look_at_database(engine, settings)
    return asyncio.run(look_at_the_rest(overview, bridge_settings, state_dir=state_dir))


def look_at_database(engine: sa.Engine, settings: EtlSettings) -> Overview:
    """数据库一侧。读不成的，也看它让不让做：那里说得更清楚；别的照读。"""
    overview, problem = Overview(), None
    for read in (_read_ledger, _read_history):
        try:
            overview = replace(overview, **transact(engine, read, settings))
        except DatabaseUnavailableError as error:
            return replace(overview, database=redact(str(error)))
        except DatabaseRefusedError as error:
            problem = redact(str(error))
    try:
        transact(engine, readiness.assert_usable, settings.target_schema)
        return replace(overview, database=problem, indexes=_missing_indexes(engine, settings))
    except (DatabaseUnavailableError, DatabaseRefusedError) as error:
        return replace(overview, database=redact(str(error)))


def _missing_indexes(engine: sa.Engine, settings: EtlSettings) -> list[str]:
    return [work.says for work in transact(engine, find_index_work, settings)]


def _read_ledger(connection: sa.Connection, settings: EtlSettings) -> dict[str, Any]:
    return {
        "ledger": _rows(reports.ledger_summary(connection, settings)),
        "held": _rows(reports.held_days(connection, settings)),
        "running": _rows(reports.running_leases(connection, settings)),
        "rejected": _rows(reports.rejected_by_rule(connection, settings)),
        "troubles": _rows(recent_troubles(connection)),
        "unpublished_events": reports.unpublished_events(connection),
        "set_aside_events": reports.set_aside_events(connection)._asdict(),
        "waiting_events": reports.count_waiting_events(connection, settings)._asdict(),
        "scattered_orders": list(troubles_of_imports(connection, settings.target_schema)),
    }


def _read_history(connection: sa.Connection, settings: EtlSettings) -> dict[str, Any]:
    return {
        "failed": _rows(reports.failed_runs(connection, settings)),
        "unbalanced": _rows(unbalanced_days(connection, settings.target_schema)),
        "lag": dict(reports.event_lag(connection, settings)),
        "failed_checks": _rows(checked_alerts(connection, settings.target_schema)),
        "unsaid_alerts": count_unsaid(connection, settings.target_schema),
    }


def _rows(found: Sequence[sa.RowMapping]) -> Rows:
    return [dict(row) for row in found]


async def look_at_the_rest(overview: Overview, bridge_settings: BridgeSettings, *, state_dir: Path) -> Overview:
    """加上 NATS 一侧与磁盘。"""
    overview = replace(overview, disk=look_at_disk(state_dir))
    try:
        return replace(overview, queues=await read_queue_depths(bridge_settings))
    except BridgeError as error:
        return replace(overview, nats=redact(str(error)))


def look_at_disk(state_dir: Path) -> Disk:
    folder = next(parent for parent in (state_dir, *state_dir.parents) if parent.exists())
    return Disk(str(folder), shutil.disk_usage(folder).free)
