"""一次导入、一段日子走到哪里：`etl wait`、`backfill` 与撤回等的就是它。只读。"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings


@dataclass(frozen=True)
class Progress:
    """一次导入或一段日子走到哪里：handled 是要求进了台账没有，days、done、held 是要做的、做完的、搁置的天数。"""

    handled: bool
    days: int
    done: int
    held: int
    held_reason: str | None


def import_progress(connection: sa.Connection, settings: EtlSettings, import_id: UUID, *, since: datetime | None = None) -> Progress:
    """一次导入要求的日子做到了没有；每个资产都做到了那个版本，就是全程都做到了。

    :param since: 数据库的钟；在那之前处理的事件不算，有了之后的才看日子。
    """
    target = settings.target_schema
    # 先看事件进了台账没有：反过来，两条语句之间进来的事件会显得没有一天要做
    event = sa.select(import_events.c.event_id).where(import_events.c.target == target, import_events.c.import_id == import_id)
    handled = connection.execute(event if since is None else event.where(import_events.c.handled_at >= since)).first()
    if since is not None and handled is None:
        return Progress(handled=False, days=0, done=0, held=0, held_reason=None)
    days = _DAYS_OF_IMPORT.bindparams(target=target, import_id=import_id).subquery("days")
    return _read(connection, days, handled=handled is not None)


def handled_sequence(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> int:
    """这次导入最新处理的事件在流里的序号；没有就是 0。"""
    known = sa.select(import_events.c.stream_sequence).where(
        import_events.c.target == settings.target_schema, import_events.c.import_id == import_id
    )
    return connection.scalar(known) or 0


def range_progress(connection: sa.Connection, settings: EtlSettings, days: DayRange, *, asset: str | None = None) -> Progress:
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


_DAYS_OF_IMPORT = sa.text("""
    SELECT bool_and(l.materialized >= r.revision) AS is_done, max(l.held_reason) AS reason
    FROM etl.import_requests r JOIN etl.assets a ON a.target = :target
    JOIN etl.ledger l ON l.target = :target AND l.asset = a.asset AND l.day = r.day
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
