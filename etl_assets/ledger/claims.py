"""领活：到期、没人做、也没在等的日子，连同一个运行该做的资产。"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import unnest
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_together
from etl_assets.core.etl_tables import assets, import_events, import_requests, leases, ledger, stale_customers
from etl_assets.core.tables import import_tasks
from etl_assets.ledger.graph import IN_GRAPH, LINE
from etl_assets.ledger.leases import Lease, in_seconds
from etl_assets.ledger.locks import lock_parameters, lock_statements
from etl_assets.ledger.requests import overlap

MAX_DAYS_PER_RUN = 30
_NAMED_EVENTS = 10

RUSH_IMPORTS = 16
"""上次做完以来，等着同一天的导入不止这么多个，就是一阵急雨。"""
RUSH_ROWS = 10_000
"""等着的导入已有这么多行，够一个运行做的，就不再等。"""
_MOST_LOOKED_AT = 1_000
SMALL_ROWS = 1_000
"""等着的导入没有成急雨、一共不到这么多行，或者等着的只是不到这么多个客户，就是小的日子：不到一秒就做完。"""
RUSH_QUIET_SECONDS = 1.0
RUSH_PATIENCE_SECONDS = 10.0
"""急雨里的日子静下来这么久再做；一直不静，离上次做完这么久也做。"""


class AskingEvent(NamedTuple):
    """还等着这些天的一个导入，与要求它的事件。"""

    import_id: str
    event_id: str
    stream_sequence: int | None


@dataclass(frozen=True)
class Claim:
    """领到的工作：这段日子的这些资产，上游在前；more 表示还有别的到期日子没人做。

    retry_of 是上次做这些日子而失败的运行；asked_by 是最新的几个要求它们的事件。
    """

    lease: Lease
    days: DayRange
    assets: tuple[str, ...]
    more: bool
    retry_of: str | None = None
    asked_by: Sequence[AskingEvent] = ()


def claim_due_days(
    connection: sa.Connection,
    target: str,
    *,
    run_id: str,
    owner: str,
    lease_seconds: float,
    known: Collection[str] | None = None,
    small: bool = False,
) -> Claim | None:
    """领走等得最久的一段到期日子（连续、从同样的资产起、至多 30 天）；没有可领的是 None。锁住、找到、记下租约，一次往返。

    :param known: 领的人的代码里有的资产；别的、排在别的后面的，留给有它们的工人。缺省是全都有。
    :param small: 只领小的：说得出变了什么，等着的是几次小导入。
    """
    lease = Lease(run_id=run_id, token=uuid4())
    values = {"run_id": run_id, "token": lease.token, "owner": owner, "of_target": target, "seconds": lease_seconds}
    *_, claimed = execute_together(
        connection,
        *lock_statements(),
        _claim(small=small),
        parameters=values | {"known": None if known is None else sorted(known)} | lock_parameters(target, "claim", [0]),
    )
    ((first, last, available, failed_run_id, other_failed_run_id, made, asked_by, leased_run_id),) = claimed
    if first is None:
        return None
    days = DayRange(first, last)
    if leased_run_id is None:
        raise ValueError(f"run {run_id} is not new")
    return Claim(
        lease=lease,
        days=days,
        assets=tuple(made),
        more=available > len(days),
        retry_of=failed_run_id if failed_run_id == other_failed_run_id else None,
        asked_by=[AskingEvent(*event) for event in asked_by or ()],
    )


def has_claimable_days(connection: sa.Connection, target: str) -> bool:
    """有没有到期、没人做、也不在等重试的日子。"""
    days = _claimable_days()
    return bool(connection.execute(sa.select(sa.select(days.c.day).exists()), {"of_target": target, "known": None}).scalar())


def has_days_in_a_rush(connection: sa.Connection, target: str) -> bool:
    """有没有到期、只因为还在一阵急雨里才不能领的日子。"""
    waiting = sa.select(ledger.c.day).join(assets, IN_GRAPH).where(_IS_DUE, _is_in_a_rush())
    return bool(connection.execute(sa.select(waiting.exists()), {"of_target": target}).scalar())


def quietest_day(connection: sa.Connection, target: str, asset: str, days: Collection[date]) -> date:
    """这些天里没有活挡着 asset 的最早的一天：它的上游不到期，也没有运行占着；都挡着就是最早的。"""
    parameters = {"of_target": target, "of_asset": asset, "days": sorted(days)}
    day: date = connection.execute(_quietest_day(), parameters).scalar_one()
    return day


def read_overdue_days(connection: sa.Connection, target: str, after: timedelta) -> list[tuple[DayRange, datetime]]:
    """到期了这么久还没人做的日子，连续的成一段（至多 30 天），连同等了最久的要求的时刻。"""
    due = _claimable_days()
    overdue = sa.select(due.c.day, due.c.since).where(due.c.since < sa.func.clock_timestamp() - after).order_by(due.c.day)
    ranges: list[tuple[DayRange, datetime]] = []
    for day, since in connection.execute(overdue, {"of_target": target, "known": None}):
        last = ranges[-1] if ranges else None
        if last and day == last[0].last + timedelta(days=1) and len(last[0]) < MAX_DAYS_PER_RUN:
            ranges[-1] = (DayRange(last[0].first, day), min(last[1], since))
        else:
            ranges.append((DayRange(day, day), since))
    return ranges


# ---- 语句 ------------------------------------------------------------------------

_TARGET = sa.bindparam("of_target", type_=sa.Text)
_KNOWN = sa.bindparam("known", type_=sa.ARRAY(sa.Text))
_IS_DUE = sa.and_(ledger.c.target == _TARGET, ledger.c.requested > ledger.c.materialized)
_IS_KNOWN = sa.func.coalesce(LINE.op("<@")(_KNOWN), sa.true(), type_=sa.Boolean())


@lru_cache(maxsize=1)
def _quietest_day() -> sa.Select[tuple[date]]:
    wanted = unnest("wanted", day=sa.bindparam("days", type_=sa.ARRAY(sa.Date)))
    of_asset = sa.and_(assets.c.target == _TARGET, assets.c.asset == sa.bindparam("of_asset", type_=sa.Text))
    upstream = sa.select(ledger.c.day).join(assets, sa.and_(of_asset, ledger.c.asset == sa.any_(assets.c.ancestors)))
    is_behind = upstream.where(_IS_DUE, ledger.c.day == wanted.c.day).correlate(wanted).exists()
    return sa.select(wanted.c.day).order_by(sa.or_(is_behind, _is_leased(wanted.c.day)), wanted.c.day).limit(1)


def _is_leased(day: sa.ColumnElement[date]) -> sa.ColumnElement[bool]:
    """有运行占着这一天。"""
    leased = sa.select(leases.c.run_id).where(leases.c.target == _TARGET, day.between(leases.c.first_day, leases.c.last_day))
    return leased.exists()


@lru_cache(maxsize=2)
def _claim(*, small: bool) -> sa.Select[Any]:
    """`_oldest_island`、它的资产与事件，和给它记下的租约的运行。每次领都要，只建一次。"""
    island = _oldest_island(small=small).cte("island").prefix_with("MATERIALIZED")
    # 排在动不了的后面的不做：它们轮到时还要再做
    is_made = sa.and_(overlap(LINE, island.c.starts), ~overlap(LINE, island.c.stuck), _IS_KNOWN)
    made = sa.select(assets.c.asset).where(assets.c.target == _TARGET, is_made).order_by(assets.c.position)
    names = ("run_id", "token", "owner")
    given = [sa.bindparam(name, type_=leases.c[name].type) for name in names]
    seconds = sa.bindparam("seconds", type_=sa.Float)
    rows = sa.select(*given, _TARGET, island.c.first, island.c.last, in_seconds(seconds)).where(island.c.first.is_not(None))
    insert = pg.insert(leases).from_select([*names, "target", "first_day", "last_day", "expires_at"], rows)
    leased = insert.on_conflict_do_nothing().returning(leases.c.run_id).cte("leased")
    return sa.select(
        *island.c["first", "last", "available", "failed_run_id", "other_failed_run_id"],
        sa.func.array(made.scalar_subquery()),
        _asking_events(island),
        sa.select(leased.c.run_id).scalar_subquery(),
    )


def _asking_events(island: sa.CTE) -> sa.ScalarSelect[Any]:
    """还等着这段日子里要从头做起的资产的导入，最新的几个。"""
    waits = sa.and_(
        ledger.c.target == _TARGET,
        ledger.c.asset == sa.any_(island.c.starts),
        ledger.c.day.between(island.c.first, island.c.last),
    )
    asked = sa.and_(import_requests.c.target == _TARGET, import_requests.c.day == ledger.c.day)
    newest = (
        sa.select(
            import_events.c.import_id,
            import_events.c.event_id,
            import_events.c.stream_sequence,
            sa.func.max(import_requests.c.revision).label("revision"),
        )
        .select_from(ledger)
        .join(import_requests, sa.and_(asked, import_requests.c.revision > ledger.c.materialized))
        .join(import_events, sa.and_(import_events.c.target == _TARGET, import_events.c.import_id == import_requests.c.import_id))
        .where(waits)
        .group_by(import_events.c.import_id, import_events.c.event_id, import_events.c.stream_sequence)
        .order_by(sa.desc("revision"), import_events.c.import_id)
        .limit(_NAMED_EVENTS)
        .correlate(island)
        .subquery("newest")
    )
    event = sa.func.jsonb_build_array(newest.c.import_id, newest.c.event_id, newest.c.stream_sequence)
    listed = sa.func.jsonb_agg(pg.aggregate_order_by(event, newest.c.revision.desc(), newest.c.import_id), type_=pg.JSONB)
    return sa.select(listed).scalar_subquery()


def _oldest_island(*, small: bool) -> sa.Select[Any]:
    """等得最久的一段：头、尾、从哪些资产起、哪些动不了、能领的日子共有几个、上次失败的运行（最小的与最大的）。"""
    due = _claimable_days(small=small)
    same = (due.c.starts, due.c.stuck)
    # 连续的日子减去行号得同一个值，于是每段连续、起点相同的日子成一组
    island = due.c.day - sa.cast(sa.func.row_number().over(partition_by=same, order_by=due.c.day), sa.Integer)
    islands = sa.select(*due.c, sa.func.count().over().label("available"), island.label("island")).cte("islands")
    oldest = sa.select(islands).order_by(islands.c.since, islands.c.day).limit(1).subquery("oldest")
    reach = oldest.c.day + (MAX_DAYS_PER_RUN - 1)
    is_same = [islands.c[name].is_not_distinct_from(oldest.c[name]) for name in ("island", "starts", "stuck")]

    def of_all(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.func.max(column, type_=column.type).label(column.key)

    return (
        sa.select(
            sa.func.min(islands.c.day).label("first"),
            sa.func.max(islands.c.day).label("last"),
            *[of_all(oldest.c[name]) for name in ("starts", "stuck", "available")],
            sa.func.min(islands.c.failed_run_id).label("failed_run_id"),
            sa.func.max(islands.c.failed_run_id).label("other_failed_run_id"),
        )
        .join(oldest, sa.and_(*is_same))
        .where(islands.c.day.between(oldest.c.day, reach))
    )


@lru_cache(maxsize=2)
def _claimable_days(*, small: bool = False) -> sa.Subquery:
    """一行一个能领的日子：since 是等了最久的要求。

    到期而前面没有到期的资产，能领的是 starts，在等的（搁置、等重试、急雨、领的人没有它）是 stuck。
    """
    is_ready = sa.and_(
        ledger.c.held_reason.is_(None),
        sa.or_(ledger.c.retry_at.is_(None), ledger.c.retry_at <= sa.func.clock_timestamp()),
        ~_is_in_a_rush(),
        _IS_KNOWN,
        *([_is_small()] if small else []),
    )
    due_assets = (
        sa.select(
            *ledger.c["day", "asset", "requested_at", "failed_run_id"],
            assets.c.ancestors,
            sa.func.array_agg(ledger.c.asset, type_=pg.ARRAY(sa.Text)).over(partition_by=ledger.c.day).label("due"),
            is_ready.label("is_ready"),
        )
        .join(assets, IN_GRAPH)
        .where(_IS_DUE, ~_is_leased(ledger.c.day))
        .subquery("due_assets")
    )
    due = due_assets.c
    names = sa.func.array_agg(pg.aggregate_order_by(due.asset, due.asset), type_=pg.ARRAY(sa.Text))
    return (
        sa.select(
            due.day,
            names.filter(due.is_ready).label("starts"),
            names.filter(~due.is_ready).label("stuck"),
            sa.func.min(due.requested_at).filter(due.is_ready).label("since"),
            sa.func.min(due.failed_run_id).filter(due.is_ready).label("failed_run_id"),
        )
        .where(~overlap(due.ancestors, due.due))
        .group_by(due.day)
        .having(sa.func.bool_or(due.is_ready))
        .subquery("due_days")
    )


def _is_in_a_rush() -> sa.ColumnElement[bool]:
    """刚做完，又积下了许多导入，还在来：等一等，几千个事件才不会一个运行接着一个运行。从没做过的日子、积得够多的不等。"""
    recent = sa.and_(ledger.c.requested_at > in_seconds(-RUSH_QUIET_SECONDS), ledger.c.materialized_at > in_seconds(-RUSH_PATIENCE_SECONDS))
    waiting = _waiting(_MOST_LOOKED_AT)
    rows = sa.func.coalesce(sa.func.sum(waiting.c.row_count), 0)
    many = sa.select(sa.and_(sa.func.count() > RUSH_IMPORTS, rows < RUSH_ROWS)).select_from(waiting)
    return sa.case((recent, many.scalar_subquery()), else_=sa.false())


def _is_small() -> sa.ColumnElement[bool]:
    """不知道行数的导入算大的；整天重做的也是。没有导入等着的，看标记了几个客户。"""
    waiting = _waiting(RUSH_IMPORTS + 1)
    unknown = sa.func.coalesce(waiting.c.row_count, SMALL_ROWS)
    count = sa.func.count()
    few_customers = sa.and_(count == 0, sa.func.cardinality(assets.c.ancestors) > 0, _marked_customers() < SMALL_ROWS)
    few_rows = sa.and_(count.between(1, RUSH_IMPORTS), sa.func.sum(unknown) < SMALL_ROWS)
    is_little = sa.select(sa.or_(few_rows, few_customers)).select_from(waiting).correlate(ledger, assets)
    return sa.and_(ledger.c.changed_until == ledger.c.requested, is_little.scalar_subquery())


def _marked_customers() -> sa.ScalarSelect[int]:
    """等着这一行的标记有几个，至多数到 SMALL_ROWS。"""
    of_row = [stale_customers.c[name] == ledger.c[name] for name in ("target", "asset", "day")]
    marks = sa.select(stale_customers.c.mark_id).where(*of_row).correlate(ledger).limit(SMALL_ROWS).subquery()
    return sa.select(sa.func.count()).select_from(marks).scalar_subquery()


def _waiting(limit: int) -> sa.Subquery:
    """等着这一行的导入，至多看这么多个。"""
    return (
        sa.select(import_tasks.c.row_count)
        .select_from(import_requests)
        .outerjoin(import_tasks, import_tasks.c.import_id == import_requests.c.import_id)
        .where(
            import_requests.c.target == ledger.c.target,
            import_requests.c.day == ledger.c.day,
            import_requests.c.revision > ledger.c.materialized,
        )
        .correlate(ledger)
        .limit(limit)
        .subquery()
    )
