"""台账与导入对得上吗：从备份恢复之后、事件没有发出来时，会对不上。只读；给 `etl doctor`。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.etl_tables import import_events, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.reports.progress import is_forgotten
from etl_assets.services.raw_rows import IN_SCOPE

_ON_THE_WAY = timedelta(minutes=1)
"""刚完成的导入，事件可能正在路上，或者监听器正等着宽限过去。"""


def unannounced_imports(connection: sa.Connection, settings: EtlSettings) -> Sequence[str]:
    """完成了而台账从没听说过的导入，旧的在前；监听器过了宽限会自己要进来的、听说过又忘了的不算。"""
    heard = [
        sa.exists().where(known.c.import_id == import_tasks.c.import_id, known.c.target == settings.target_schema)
        for known in (import_events, waiting_events)
    ]
    is_known = is_forgotten(settings, import_tasks.c.completed_at)
    silent = sa.select(import_tasks.c.import_id).where(IN_SCOPE, is_settled(settings), ~is_known, ~sa.or_(*heard))
    return [
        str(import_id)
        for import_id in connection.scalars(silent.order_by(import_tasks.c.completed_at, import_tasks.c.import_id))
    ]


def newest_handled_sequence(connection: sa.Connection, settings: EtlSettings) -> int:
    """台账听说过的最新的事件在流里的序号；没有就是 0。"""
    newest = sa.select(sa.func.max(import_events.c.stream_sequence)).where(
        import_events.c.target == settings.target_schema
    )
    return connection.scalar(newest) or 0


def lacks_event(
    connection: sa.Connection, settings: EtlSettings, *, import_id: UUID, event_id: UUID, sequence: int
) -> bool:
    """这个已处理的导入事件，台账该知道却不知道。没有这次导入的（进了死信）、从未入表就撤回的，台账本来不记。"""
    remembered = sa.and_(
        import_events.c.import_id == import_tasks.c.import_id, import_events.c.target == settings.target_schema
    )
    row = connection.execute(
        sa.select(import_tasks.c.status, import_events.c.event_id, import_events.c.stream_sequence)
        .outerjoin(import_events, remembered)
        .where(import_tasks.c.import_id == import_id)
    ).first()
    if row is None or row.event_id is None:
        waits = sa.exists().where(
            waiting_events.c.target == settings.target_schema,
            waiting_events.c.import_id == import_id,
            waiting_events.c.event_id == event_id,
        )
        return row is not None and row.status == "completed" and not connection.scalar(sa.select(waits))
    # 台账只记每个导入最新的事件：序号更大的盖过了它，不算缺
    return row.event_id != event_id and (row.stream_sequence or 0) < sequence


def is_settled(settings: EtlSettings) -> sa.ColumnElement[bool]:
    on_the_way = _ON_THE_WAY + timedelta(seconds=settings.unannounced_after_seconds)
    return sa.func.coalesce(import_tasks.c.completed_at < sa.func.now() - on_the_way, sa.true())
