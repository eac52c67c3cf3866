"""完成了而没有人宣布的导入：应用提交之后、发布之前死了，或者 NATS 弄丢了事件。过了宽限就当作宣布了。

只看按 completed_at 排的一小段：看到哪里记在 etl.import_watches。第一次看从那时起，更早的从不去要。
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID, uuid5

import sqlalchemy as sa

from etl_assets.core.errors import EtlError
from etl_assets.core.etl_tables import TARGET, import_events, waiting_events
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.intake.imports import NO_SEQUENCE, ImportEvent, remember_waiting, request_affected_days
from etl_assets.intake.separate_transactions import handle_apart
from etl_assets.ledger.locks import lock_imports
from etl_assets.services.raw_rows import IN_SCOPE

BITE = 500
LOOK_BACK = timedelta(hours=1)
"""提交得晚的、钟慢的应用写下的 completed_at，晚到这么久也看得到。"""
_cannot_request = RepeatedWarning(get_logger(__name__), "an import that nobody announced cannot be taken in")
_NAMESPACE = UUID("6f1b2d5c-52b0-4a0e-9a0e-3f9a5a7c1e11")


def request_unannounced(engine: sa.Engine, settings: EtlSettings, *, handled_until: datetime | None) -> Sequence[UUID]:
    """要求一批没有人宣布的导入，返回要求了的；正好 BITE 个时还有。别的监听器正看着就什么也不做。

    要求不了的像早到的事件那样等着（etl.waiting_events）：越来越久地再试，不挡别的，也不会过了 LOOK_BACK 就忘了。

    :param handled_until: 监听器还有事件没处理时，其中最早的一个是何时存下的：此后完成的导入，事件可能排着队。
    """
    target = settings.target_schema
    with engine.begin() as connection:
        connection.execute(_BEGIN, {"of_target": target, "grace": settings.unannounced_after_seconds})
        watch = connection.execute(_WATCH, {"of_target": target}).one_or_none()
        if watch is None:
            return []
        until = min(watch.now, handled_until or watch.now) - timedelta(seconds=settings.unannounced_after_seconds)
        stretch = {"of_target": target, "after": max(watch.watched_from, watch.watched_until - LOOK_BACK), "until": until}
        silent = connection.scalars(_SILENT, stretch).all()

    def request(connection: sa.Connection, import_ids: Sequence[UUID]) -> Sequence[UUID]:
        # 等锁的工夫，它的事件可能正好处理了，或者别的监听器要求了
        lock_imports(connection, target, import_ids)
        still_silent = connection.scalars(_STILL_SILENT, {**stretch, "import_ids": list(import_ids)}).all()
        if still_silent:
            events = [ImportEvent(import_id, event_id_of(import_id)) for import_id in still_silent]
            request_affected_days(connection, settings, events)
        return still_silent

    def set_aside(import_id: UUID, error: EtlError) -> None:
        _cannot_request.say(type(error).__name__, import_id=str(import_id), error=str(error))
        event = ImportEvent(import_id, event_id_of(import_id), sequence=NO_SEQUENCE, stored_at=watch.now)
        with engine.begin() as connection:
            remember_waiting(connection, target, [event])

    requested, tried_all = handle_apart(engine, silent, request, complain=set_aside)
    if tried_all and len(silent) < BITE:
        with engine.begin() as connection:
            connection.execute(_ADVANCE, {"of_target": target, "until": until})
    return requested


def event_id_of(import_id: UUID) -> UUID:
    """没有事件的导入，台账里记的事件编号：由导入而来，谁来算都一样。"""
    return uuid5(_NAMESPACE, str(import_id))


_BEGIN = sa.text("""
    INSERT INTO etl.import_watches (target, watched_from, watched_until)
    SELECT :of_target, started, started FROM (SELECT now() - make_interval(secs => :grace) AS started) AS beginning
    ON CONFLICT DO NOTHING
""").bindparams(sa.bindparam("grace", type_=sa.Double))
_WATCH = sa.text("""
    SELECT watched_from, watched_until, now() AS now FROM etl.import_watches WHERE target = :of_target FOR UPDATE SKIP LOCKED
""")
_ADVANCE = sa.text("UPDATE etl.import_watches SET watched_until = greatest(watched_until, :until) WHERE target = :of_target")
_UNTIL = sa.bindparam("until", type_=import_tasks.c.completed_at.type)
_SILENT = (
    sa.select(import_tasks.c.import_id)
    .where(
        IN_SCOPE,
        import_tasks.c.completed_at > sa.bindparam("after", type_=import_tasks.c.completed_at.type),
        import_tasks.c.completed_at <= _UNTIL,
        *(
            ~sa.exists().where(known.c.target == TARGET, known.c.import_id == import_tasks.c.import_id)
            for known in (import_events, waiting_events)
        ),
    )
    .order_by(import_tasks.c.completed_at)
    .limit(BITE)
)
_STILL_SILENT = _SILENT.where(import_tasks.c.import_id == sa.any_(sa.bindparam("import_ids", type_=sa.ARRAY(sa.Uuid))))
