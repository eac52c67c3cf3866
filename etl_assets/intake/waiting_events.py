"""导入还没完成的事件：记在台账里，到点再看；完成了就要求它的日子，限期过了交给监听器进死信。

几个监听器分着看：到点的行谁锁住谁看。
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import compress

import sqlalchemy as sa

from etl_assets.core import metrics
from etl_assets.core.arrays import array, given_rows, in_arrays
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import DatabaseUnavailableError, EtlError
from etl_assets.core.etl_tables import TARGET, waiting_events
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import NO_SEQUENCE, ImportEvent, take_in

logger = get_logger(__name__)

BITE = 1_000
PROBES = 3
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


@translated_errors()
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


def _take_in(engine: sa.Engine, settings: EtlSettings, events: Sequence[WaitingEvent]) -> int:
    """要求它们的日子，返回要求了几次导入。整批做不成就一个一个事务地来：一个拖不住其余的，也不扣着它们的锁。

    做不了的留着下次再看，不论是谁的错：导入既然在，就不进死信。有几个做不了，其余的这一回不试：锁等不到时，
    一个就是 ETL_LOCK_TIMEOUT_SECONDS。数据库不在照抛。
    """
    if not events:
        return 0
    requested, error = _attempt(engine, settings, events)
    if error is None:
        return requested
    failed = 0
    for event in random.sample(events, len(events)):  # 每次都从同样几个试起，会一直轮不到别的
        taken, error = _attempt(engine, settings, [event]) if len(events) > 1 else (0, error)
        requested += taken
        if error is not None:
            _cannot_take_in.say(type(error).__name__, import_id=str(event.import_id), error=str(error))
            failed += 1
        if failed == PROBES:
            break
    return requested


def _attempt(engine: sa.Engine, settings: EtlSettings, ripe: Sequence[WaitingEvent]) -> tuple[int, EtlError | None]:
    try:
        with translated_errors(), engine.begin() as connection:
            outcomes = take_in(connection, settings, ripe)
            settled = [outcome not in ("pending", "missing") for outcome in outcomes]
            forget(connection, settings.target_schema, list(compress(ripe, settled)))
    except DatabaseUnavailableError:
        raise
    except EtlError as error:
        return 0, error
    except Exception as error:  # noqa: BLE001  # 一个上面的什么错，都拖不住别的
        return 0, EtlError(f"{type(error).__name__}: {error}")
    unannounced = sum(
        event.sequence == NO_SEQUENCE and outcome == "requested" for event, outcome in zip(ripe, outcomes, strict=True)
    )
    requested = outcomes.count("requested")
    metrics.imports_taken_in("unannounced", unannounced)
    metrics.imports_taken_in("waited", requested - unannounced)
    return requested, None


def forget(connection: sa.Connection, target: str, events: Sequence[WaitingEvent]) -> None:
    """已经进了死信的、处理了的不再等；正好又发布了一回的，序号是新的：它还要等。"""
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
    array("delays", sa.Double),
    sa.bindparam("longest_delay", type_=sa.Double),
    sa.bindparam("limit_seconds", type_=sa.Double),
)
_KEY = ("import_id", "event_id", "stream_sequence")
_GONE = given_rows(waiting_events, _KEY)
_IS_GONE = [waiting_events.c[name] == _GONE.c[name] for name in _KEY]
_FORGET = sa.delete(waiting_events).where(waiting_events.c.target == TARGET, *_IS_GONE)
