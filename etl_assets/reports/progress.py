"""一次导入、一段日子走到哪里：`etl wait`、`backfill` 与撤回等的就是它。只读。"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import import_events, import_watches, retention
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks


@dataclass(frozen=True)
class Progress:
    """一次导入或一段日子走到哪里：handled 是要求进了台账没有，days、done、held 是要做的、做完的、搁置的天数。"""

    handled: bool
    days: int
    done: int
    held: int
    held_reason: str | None


def import_progress(
    connection: sa.Connection, settings: EtlSettings, import_id: UUID, *, since: datetime | None = None
) -> Progress:
    """一次导入要求的日子做到了没有；每个资产都做到了那个版本，就是全程都做到了。

    :param since: 数据库的钟；在那之前处理的事件不算，有了之后的才看日子。
    """
    target = settings.target_schema
    # 先看事件进了台账没有：反过来，两条语句之间进来的事件会显得没有一天要做
    event = sa.select(import_events.c.event_id).where(
        import_events.c.target == target, import_events.c.import_id == import_id
    )
    found = connection.execute(event if since is None else event.where(import_events.c.handled_at >= since)).first()
    if since is not None and found is None:
        return Progress(handled=False, days=0, done=0, held=0, held_reason=None)
    handled = found is not None or was_forgotten(connection, settings, import_id)
    days = _DAYS_OF_IMPORT.bindparams(target=target, import_id=import_id).subquery("days")
    return _read(connection, days, handled=handled)


def was_forgotten(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> bool:
    """台账早已忘了它：完成在忘到的时刻之前、看着导入之后，那时的都做完了。"""
    is_it = sa.and_(import_tasks.c.import_id == import_id, import_tasks.c.status == "completed")
    forgotten = is_forgotten(settings, import_tasks.c.completed_at)
    return bool(connection.scalar(sa.select(sa.exists().where(is_it, forgotten))))


def is_forgotten(settings: EtlSettings, completed_at: sa.ColumnElement[datetime]) -> sa.ColumnElement[bool]:
    """SQL：那时完成的导入，台账的簿记可能已经没有了（`intake/retention.py`）；不在里面的都还记着。"""
    watched_from = sa.select(import_watches.c.watched_from).where(import_watches.c.target == settings.target_schema)
    forgotten_until = sa.select(retention.c.forgotten_until)
    is_within = sa.and_(
        completed_at >= watched_from.scalar_subquery(), completed_at < forgotten_until.scalar_subquery()
    )
    return sa.func.coalesce(is_within, sa.false())


def handled_sequence(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> int:
    """这次导入最新处理的事件在流里的序号；没有就是 0。"""
    known = sa.select(import_events.c.stream_sequence).where(
        import_events.c.target == settings.target_schema, import_events.c.import_id == import_id
    )
    return connection.scalar(known) or 0


def range_progress(
    connection: sa.Connection, settings: EtlSettings, days: DayRange, *, asset: str | None = None
) -> Progress:
    """一段日子走到哪里：没有一个资产到期的日子算做完。

    :param asset: 只看它、排在它后面的，与它们等着的；别的分支到期、搁置都不相干。
    """
    parameters = {"target": settings.target_schema, "first": days.first, "last": days.last, "asset": asset}
    return _read(connection, _DAYS_OF_RANGE.bindparams(**parameters).subquery("days"), handled=True)


def _read(connection: sa.Connection, days: sa.Subquery, *, handled: bool) -> Progress:
    """:param days: 一行一天：is_done，与搁置的缘由 reason。"""
    in_vain = sa.and_(~days.c.is_done, days.c.reason.is_not(None))
    counts = sa.select(
        sa.func.count().label("days"),
        sa.func.count().filter(days.c.is_done).label("done"),
        sa.func.count().filter(in_vain).label("held"),
        sa.func.max(days.c.reason).filter(in_vain).label("held_reason"),
    )
    return Progress(handled=handled, **connection.execute(counts.select_from(days)).one()._mapping)


# 没有行的资产是旧版本落下的，不算做到（`ledger/graph.py: catch_up`）
_DAYS_OF_IMPORT = sa.text("""
    SELECT bool_and(coalesce(l.materialized >= r.revision, false)) AS is_done, max(l.held_reason) AS reason
    FROM etl.import_requests r JOIN etl.assets a ON a.target = :target
    LEFT JOIN etl.ledger l ON l.target = :target AND l.asset = a.asset AND l.day = r.day
    WHERE r.target = :target AND r.import_id = :import_id
    GROUP BY r.day""").columns(is_done=sa.Boolean, reason=sa.Text)

# asset 是 NULL 就看全部
_DAYS_OF_RANGE = sa.text("""
    SELECT bool_and(l.requested <= l.materialized) AS is_done,
           max(l.held_reason) FILTER (WHERE l.requested > l.materialized) AS reason
    FROM etl.ledger l JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
    WHERE l.target = :target AND l.day BETWEEN :first AND :last AND (CAST(:asset AS text) IS NULL OR EXISTS (
        SELECT FROM etl.assets asked
        WHERE asked.target = a.target AND (asked.asset = :asset OR :asset = ANY (asked.ancestors))
              AND (asked.asset = a.asset OR a.asset = ANY (asked.ancestors))
    ))
    GROUP BY l.day""").columns(is_done=sa.Boolean, reason=sa.Text)
