"""导入还没完成的事件：记在台账里，到点再看；完成了就要求它的日子，限期过了交给监听器进死信。

几个监听器分着看：到点的行谁锁住谁看。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from etl_assets.core.arrays import given_rows, in_arrays
from etl_assets.core.backoff import Backoff
from etl_assets.core.errors import EtlError
from etl_assets.core.etl_tables import TARGET, waiting_events
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, take_in
from etl_assets.intake.separate_transactions import handle_apart

logger = get_logger(__name__)

BITE = 1_000
_SETTLED = ("completed", "failed")

_cannot_take_in = RepeatedWarning(logger, "an event that waited cannot be taken in, trying again")


@dataclass(frozen=True)
class Patience:
    """隔多久再看；limit_seconds 是限期，从流存下事件的时刻算起。"""

    backoff: Backoff
    limit_seconds: float


@dataclass(frozen=True, kw_only=True)
class WaitingEvent(ImportEvent):
    """还在等的一个事件；都是从流里来的。"""

    sequence: int
    stored_at: datetime
    looks: int
    import_status: str | None
    """导入此刻的状态；None 是还没有它。"""
    is_overdue: bool


@dataclass(frozen=True)
class Look:
    """看过一回：要求了几次导入，谁的限期过了，还有几个在等，是不是还有没看的。"""

    requested: int
    overdue: Sequence[WaitingEvent]
    waiting: int
    more: bool


def look_after_waiting_events(engine: sa.Engine, settings: EtlSettings, patience: Patience) -> Look:
    """看一批到点的：导入完成或撤回了的处理掉，其余的排到下一次。限期过了的行留着，进了死信再由 forget 删去。

    排到下一次先提交：处理要拿导入与日子的锁，收事件的先拿它们再碰这些行，反着拿会死锁。
    """
    with engine.begin() as connection:
        rows = connection.execute(
            _LOOK,
            {
                "of_target": settings.target_schema,
                "at_most": BITE,
                "delays": patience.backoff.steps,
                "longest_delay": patience.backoff.longest_seconds,
                "limit_seconds": patience.limit_seconds,
            },
        ).all()
    due = sorted((WaitingEvent(**row._mapping) for row in rows), key=lambda event: event.sequence)  # 台账记最新的
    waiting = [event for event in due if event.import_status not in _SETTLED]
    return Look(
        requested=_take_in(engine, settings, [event for event in due if event.import_status in _SETTLED]),
        overdue=[event for event in waiting if event.is_overdue],
        waiting=len(waiting),
        more=len(due) == BITE,
    )


def forget(engine: sa.Engine, target: str, events: Sequence[WaitingEvent]) -> None:
    """已经进了死信的不再等。"""
    with engine.begin() as connection:
        _forget(connection, target, events)


def _take_in(engine: sa.Engine, settings: EtlSettings, events: Sequence[WaitingEvent]) -> int:
    """要求它们的日子；处理不了的留着下次再看，导入既然在，就不进死信。返回要求了几次导入。"""

    def take(connection: sa.Connection, ripe: Sequence[WaitingEvent]) -> list[WaitingEvent]:
        outcomes = list(zip(ripe, take_in(connection, settings, ripe), strict=True))
        _forget(connection, settings.target_schema, [event for event, outcome in outcomes if outcome not in ("pending", "missing")])
        return [event for event, outcome in outcomes if outcome == "requested"]

    def complain(event: WaitingEvent, error: EtlError) -> None:
        _cannot_take_in.say(type(error).__name__, import_id=str(event.import_id), error=str(error))

    requested, _ = handle_apart(engine, events, take, complain=complain)
    return len(requested)


def _forget(connection: sa.Connection, target: str, events: Sequence[WaitingEvent]) -> None:
    """正好又发布了一回的，序号是新的：它还要等。"""
    rows = [(event.import_id, event.event_id, event.sequence) for event in events]
    connection.execute(_FORGET, {"of_target": target, **in_arrays(waiting_events, _KEY, rows)})


# 一条语句：锁住到点的行、排到下一次、看它们的导入
_LOOK = sa.text("""
    WITH due AS (
        SELECT target, import_id, event_id,
               coalesce((:delays)[looks + 1], :longest_delay) AS delay,
               extract(epoch FROM stored_at - clock_timestamp()) + :limit_seconds AS seconds_left
        FROM etl.waiting_events
        WHERE target = :of_target AND look_at <= clock_timestamp()
        ORDER BY look_at
        LIMIT :at_most
        FOR UPDATE SKIP LOCKED
    )
    UPDATE etl.waiting_events AS waiting
    SET looks = looks + 1,
        look_at = clock_timestamp() + make_interval(secs => CASE
            WHEN due.seconds_left > 0 THEN least(due.delay, due.seconds_left) ELSE due.delay END)
    FROM due LEFT JOIN public.import_tasks AS task ON task.import_id = due.import_id
    WHERE (waiting.target, waiting.import_id, waiting.event_id) = (due.target, due.import_id, due.event_id)
    RETURNING waiting.import_id, waiting.event_id, waiting.allow_deletes, waiting.stream_sequence AS sequence,
              waiting.stored_at, waiting.looks, task.status AS import_status, due.seconds_left <= 0 AS is_overdue
""").bindparams(
    sa.bindparam("delays", type_=sa.ARRAY(sa.Double)),
    sa.bindparam("longest_delay", type_=sa.Double),
    sa.bindparam("limit_seconds", type_=sa.Double),
)
_KEY = ("import_id", "event_id", "stream_sequence")
_GONE = given_rows(waiting_events, _KEY)
_IS_GONE = [waiting_events.c[name] == _GONE.c[name] for name in _KEY]
_FORGET = sa.delete(waiting_events).where(waiting_events.c.target == TARGET, *_IS_GONE)
