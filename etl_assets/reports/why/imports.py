"""导入与要求它们的事件：登记的、文件的、台账记得的。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.etl_tables import TARGET, import_events, imported_files, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.reports.reports import shown_status

Record = dict[str, Any]


def read_imports(connection: sa.Connection, settings: EtlSettings, import_ids: Iterable[UUID]) -> list[Record]:
    """这些导入，一行一次：登记的样子与最新处理的事件；没有登记的不在。

    event 是 None，或 event_id、stream_sequence、handled_at；没有人宣布、自己收下的，stream_sequence 是 0。
    """
    parameters = {"of_target": settings.target_schema, "import_ids": sorted(set(import_ids))}
    rows = connection.execute(_IMPORTS, parameters).mappings()
    return [
        {name: value for name, value in row.items() if name not in _OF_EVENT}
        | {"event": {name: row[name] for name in _OF_EVENT} if row["event_id"] else None}
        for row in rows
    ]


def read_waiting(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> list[Record]:
    """来了、还等着这次导入的事件：event_id、stream_sequence、stored_at。"""
    waiting = waiting_events.c
    statement = sa.select(*waiting["event_id", "stream_sequence", "stored_at"]).where(
        waiting.target == settings.target_schema, waiting.import_id == import_id
    )
    return [dict(row) for row in connection.execute(statement.order_by(waiting.stored_at).limit(10)).mappings()]


def read_days(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> list[Any]:
    """这次导入要求过的日子。"""
    return list(connection.scalars(_DAYS, {"target": settings.target_schema, "import_id": import_id}))


_OF_EVENT = ("event_id", "stream_sequence", "handled_at")
_IMPORTS = (
    sa.select(
        *import_tasks.c["import_id", "source_name"],
        shown_status(import_tasks).label("status"),
        *import_tasks.c["row_count", "created_at", "completed_at"],
        *imported_files.c["first_ordered_at", "last_ordered_at", "content_hash"],
        *import_events.c[_OF_EVENT],
    )
    .select_from(import_tasks)
    .outerjoin(imported_files, imported_files.c.import_id == import_tasks.c.import_id)
    .outerjoin(
        import_events, sa.and_(import_events.c.target == TARGET, import_events.c.import_id == import_tasks.c.import_id)
    )
    .where(import_tasks.c.import_id == sa.any_(array("import_ids", sa.Uuid)))
    .order_by(import_tasks.c.completed_at.nulls_first(), import_tasks.c.import_id)
)
_DAYS = sa.text(
    "SELECT day FROM etl.import_requests WHERE target = :target AND import_id = :import_id ORDER BY day"
).columns(day=sa.Date)
