"""完成了、撤回了而没有人宣布的导入：应用提交之后、发布之前死了，或者 NATS 弄丢了事件。过了宽限就当作宣布了，像早到的事件那样记下。

台账没听说过的，只看按 completed_at 排的一小段：看到哪里记在 etl.import_watches。第一次看从那时起，更早的从不去要。
听说过的，后来改了状态（撤回没有时刻可看）：沿着台账一口一口走，一圈又一圈，两圈都看到的才算。
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID, uuid5

import sqlalchemy as sa

from etl_assets.core.database_errors import translated_errors
from etl_assets.core.etl_tables import TARGET, import_events, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.intake.imports import NO_SEQUENCE, ImportEvent, remember_waiting
from etl_assets.services.raw_rows import IS_SETTLED

BITE = 500
STEP = 5_000
"""一步看这么多个听说过的：主键上的几十毫秒，与台账记着多少无关。"""
LOOK_BACK = timedelta(hours=1)
"""提交得晚的、钟慢的应用写下的 completed_at，晚到这么久也看得到。"""
_START = UUID(int=0)
_NAMESPACE = UUID("6f1b2d5c-52b0-4a0e-9a0e-3f9a5a7c1e11")


@translated_errors()
def remember_unannounced(engine: sa.Engine, settings: EtlSettings, *, handled_until: datetime | None) -> Sequence[UUID]:
    """记下一批没有人宣布的导入（etl.waiting_events，随即轮到），返回其中完成了的；正好 BITE 个时还有。别的监听器正看着就什么也不做。

    要求不了的由那里越来越久地再试，不挡别的，也不会过了 LOOK_BACK 就忘了。

    :param handled_until: 监听器还有事件没处理时，其中最早的一个是何时存下的：此后完成的导入，事件可能排着队。
    """
    target, grace_seconds = settings.target_schema, settings.unannounced_after_seconds
    with engine.begin() as connection:
        connection.execute(_BEGIN, {"of_target": target, "grace": grace_seconds})
        watch = connection.execute(_WATCH, {"of_target": target}).one_or_none()
        if watch is None:
            return []
        until = min(watch.now, handled_until or watch.now) - timedelta(seconds=grace_seconds)
        after = max(watch.watched_from, watch.watched_until - LOOK_BACK)
        silent = connection.execute(_SILENT, {"of_target": target, "after": after, "until": until}).all()
        _remember(connection, target, [row.import_id for row in silent], watch.now)
        # 满满一口就还有：这时往前拨，剩下的过了 LOOK_BACK 就再也看不到
        if len(silent) < BITE:
            connection.execute(_ADVANCE, {"of_target": target, "until": until})
    # 没做成的导入本来就没有事件，不必说它
    return [row.import_id for row in silent if row.status == "completed"]


@dataclass
class Walk:
    """沿着台账走到了哪里。一个监听器一个，不记在库里：从头走起无妨。"""

    after: UUID = _START
    changed: set[UUID] = field(default_factory=set)
    """这一圈里看到的。"""
    suspects: Collection[UUID] = ()
    """上一圈里看到的：那时它们的事件也许正在路上。"""

    @property
    def is_at_start(self) -> bool:
        """刚走完一圈。"""
        return self.after == _START


@translated_errors()
def remember_changed(engine: sa.Engine, settings: EtlSettings, walk: Walk) -> Sequence[UUID]:
    """走一步，记下处理过之后状态变了、上一圈也看到了的导入，返回它们。"""
    target = settings.target_schema
    with engine.begin() as connection:
        step = connection.execute(_STEP, {"of_target": target, "after": walk.after, "at_most": STEP}).one()
        lost = [import_id for import_id in step.changed if import_id in walk.suspects]
        _remember(connection, target, lost, step.now)
    walk.after = step.last or _START
    walk.changed.update(step.changed)
    if step.last is None:
        walk.suspects, walk.changed = walk.changed, set()
    return lost


def event_id_of(import_id: UUID) -> UUID:
    """没有事件的导入，台账里记的事件编号：由导入而来，谁来算都一样。"""
    return uuid5(_NAMESPACE, str(import_id))


def _remember(connection: sa.Connection, target: str, import_ids: Sequence[UUID], now: datetime) -> None:
    events = [ImportEvent(each, event_id_of(each), sequence=NO_SEQUENCE, stored_at=now) for each in import_ids]
    remember_waiting(connection, target, events)


_BEGIN = sa.text("""
    INSERT INTO etl.import_watches (target, watched_from, watched_until)
    SELECT :of_target, started, started FROM (SELECT now() - make_interval(secs => :grace) AS started) AS beginning
    ON CONFLICT DO NOTHING
""").bindparams(sa.bindparam("grace", type_=sa.Double))
_WATCH = sa.text("""
    SELECT watched_from, watched_until, now() AS now FROM etl.import_watches WHERE target = :of_target FOR UPDATE SKIP LOCKED
""")
_ADVANCE = sa.text(
    "UPDATE etl.import_watches SET watched_until = greatest(watched_until, :until) WHERE target = :of_target"
)
# 撤回得快的也算：它的两个事件都丢了，别人的运行却可能写下了它的订单
_SILENT = (
    sa.select(import_tasks.c.import_id, import_tasks.c.status)
    .where(
        IS_SETTLED,
        import_tasks.c.completed_at > sa.bindparam("after", type_=import_tasks.c.completed_at.type),
        import_tasks.c.completed_at <= sa.bindparam("until", type_=import_tasks.c.completed_at.type),
        *(
            ~sa.exists().where(known.c.target == TARGET, known.c.import_id == import_tasks.c.import_id)
            for known in (import_events, waiting_events)
        ),
    )
    .order_by(import_tasks.c.completed_at)
    .limit(BITE)
)
# 正等着的不算；走到头时 last 是空的
_STEP = sa.text("""
    WITH step AS MATERIALIZED (
        SELECT import_id, import_status FROM etl.import_events
        WHERE target = :of_target AND import_id > :after ORDER BY import_id LIMIT :at_most
    )
    SELECT now() AS now,
           (SELECT import_id FROM step ORDER BY import_id OFFSET :at_most - 1 LIMIT 1) AS last,
           ARRAY(
               SELECT step.import_id FROM step JOIN public.import_tasks t ON t.import_id = step.import_id
               WHERE t.status <> step.import_status AND t.status IN ('completed', 'failed') AND NOT EXISTS (
                   SELECT FROM etl.waiting_events w WHERE w.target = :of_target AND w.import_id = step.import_id
               )
           ) AS changed
""").bindparams(sa.bindparam("after", type_=sa.Uuid), sa.bindparam("at_most", type_=sa.Integer))
