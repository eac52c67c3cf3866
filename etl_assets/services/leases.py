"""租约：哪个运行正占着哪些天，以数据库的时钟为准；提交数据之前再查一次（栅栏）。"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.errors import LeaseLostError
from etl_assets.core.tables import import_requests, leases, ledger
from etl_assets.services.ledger import ASSETS
from etl_assets.services.locks import acquire_locks

MAX_DAYS_PER_RUN = 30

RUSH_IMPORTS = 16
"""上次做完以来，等着同一天的导入不止这么多个，就是一阵急雨。"""
RUSH_QUIET_SECONDS = 1.0
RUSH_PATIENCE_SECONDS = 10.0
"""急雨里的日子静下来这么久再做；一直不静，离上次做完这么久也做。"""


@dataclass(frozen=True)
class Lease:
    """一次运行对一段日子的占有。"""

    run_id: str
    token: UUID


@dataclass(frozen=True)
class Claim:
    """领到的工作：这段日子从 assets[0] 起都要做；more 表示还有别的到期日子没人做。

    retry_of 是上次做这些日子而失败的运行。
    """

    lease: Lease
    days: DayRange
    assets: tuple[str, ...]
    more: bool
    retry_of: str | None = None


class LeaseState(StrEnum):
    """心跳看到的租约。"""

    HELD = "held"
    CANCEL_REQUESTED = "cancel_requested"
    LOST = "lost"


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""正在执行的运行的租约；没有租约（dagster dev、测试）时不设栅栏，数据锁照样有效。"""


def claim_due_days(connection: sa.Connection, target: str, *, run_id: str, owner: str, lease_seconds: float) -> Claim | None:
    """领走等得最久的一段到期日子（连续、同一个起点资产、至多 30 天）；没有可领的是 None。"""
    acquire_locks(connection, target, "claim", [0])
    first, last, start, available, failed_run_id, other_failed_run_id = connection.execute(_oldest_island(target)).one()
    if first is None:
        return None
    days = DayRange(first, last)
    lease = acquire_lease(connection, target, days, run_id=run_id, owner=owner, lease_seconds=lease_seconds)
    if lease is None:
        raise ValueError(f"run {run_id} is not new")
    return Claim(
        lease=lease,
        days=days,
        assets=ASSETS[start - 1 :],
        more=available > len(days),
        retry_of=failed_run_id if failed_run_id == other_failed_run_id else None,
    )


def has_claimable_days(connection: sa.Connection, target: str) -> bool:
    """有没有到期、没人做、也不在等重试的日子。"""
    return bool(connection.execute(sa.select(sa.select(_claimable_days(target).c.day).exists())).scalar())


def has_days_in_a_rush(connection: sa.Connection, target: str) -> bool:
    """有没有到期、只因为还在一阵急雨里才不能领的日子。"""
    waiting = sa.select(ledger.c.day).where(ledger.c.target == target, ledger.c.requested > ledger.c.materialized, _is_in_a_rush())
    return bool(connection.execute(sa.select(waiting.exists())).scalar())


def read_overdue_days(connection: sa.Connection, target: str, after: timedelta) -> list[tuple[DayRange, datetime]]:
    """到期了这么久还没人做的日子，连续的成一段（至多 30 天），连同等了最久的要求的时刻。"""
    due = _claimable_days(target)
    overdue = sa.select(due.c.day, due.c.since).where(due.c.since < sa.func.clock_timestamp() - after).order_by(due.c.day)
    ranges: list[tuple[DayRange, datetime]] = []
    for day, since in connection.execute(overdue):
        last = ranges[-1] if ranges else None
        if last and day == last[0].last + timedelta(days=1) and len(last[0]) < MAX_DAYS_PER_RUN:
            ranges[-1] = (DayRange(last[0].first, day), min(last[1], since))
        else:
            ranges.append((DayRange(day, day), since))
    return ranges


def acquire_lease(
    connection: sa.Connection, target: str, days: DayRange | None, *, run_id: str, owner: str, lease_seconds: float
) -> Lease | None:
    """给一次运行记下租约；已经有了（有人正在做，或做的人死了还没收尾）就是 None。"""
    lease = Lease(run_id=run_id, token=uuid4())
    values = {
        "run_id": run_id,
        "token": lease.token,
        "owner": owner,
        "target": target,
        "first_day": days and days.first,
        "last_day": days and days.last,
        "seconds": lease_seconds,
    }
    inserted = execute_compiled(connection, _ACQUIRE, values)
    return lease if inserted.first() else None


def extend_lease(connection: sa.Connection, lease: Lease, *, lease_seconds: float) -> LeaseState:
    """心跳：还持有时延长，并看有没有人要取消。"""
    extended = sa.update(leases).where(_HELD).values(expires_at=_in(lease_seconds)).returning(leases.c.cancel_requested_at)
    return _state(connection.execute(extended, _named(lease)).first())


def request_cancel(connection: sa.Connection, run_id: str) -> bool:
    """要持有者停下这个运行；没有人持有时返回 False。"""
    requested = sa.update(leases).where(leases.c.run_id == run_id).values(cancel_requested_at=sa.func.clock_timestamp())
    return connection.execute(requested).rowcount == 1


def read_lease(connection: sa.Connection, run_id: str) -> sa.Row[tuple[str, bool]] | None:
    """这个运行的租约：owner 与 is_live；没有就是 None。"""
    is_live = (leases.c.expires_at > sa.func.clock_timestamp()).label("is_live")
    return connection.execute(sa.select(leases.c.owner, is_live).where(leases.c.run_id == run_id)).first()


def leased_run_ids(connection: sa.Connection) -> set[str]:
    """全部有租约的运行，不论写到哪个 schema、过期与否。"""
    return set(connection.scalars(sa.select(leases.c.run_id)))


def release_lease(connection: sa.Connection, lease: Lease) -> LeaseState:
    """运行结束，不论成败；返回放手时的租约：期间有没有人要取消，或者早已不是我们的。"""
    own = sa.delete(leases).where(leases.c.run_id == lease.run_id, leases.c.token == lease.token)
    return _state(connection.execute(own.returning(leases.c.cancel_requested_at)).first())


def assert_lease_held(connection: sa.Connection) -> None:
    """栅栏：在数据事务里锁住租约行直到提交；租约不在就抛 LeaseLostError，事务随之回滚。"""
    lease = current_lease.get()
    if lease is None:
        return
    held = connection.execute(_LOCK_HELD, _named(lease)).first()
    if held is None:
        raise LeaseLostError(lease.run_id)


def read_expired_leases(connection: sa.Connection, target: str) -> Sequence[sa.Row[tuple[str, bool]]]:
    """过期的租约的 run_id 与 is_cancelled：持有者已死或被隔离，它们的运行不会再提交，租约也续不回来。

    它们的日子还占着，直到有人收了尾、删去租约：重来的运行才知道自己接着谁。
    """
    is_cancelled = leases.c.cancel_requested_at.is_not(None).label("is_cancelled")
    return connection.execute(sa.select(leases.c.run_id, is_cancelled).where(leases.c.target == target, _is_expired())).all()


def delete_expired_lease(connection: sa.Connection, run_id: str) -> bool:
    """收了尾：它的日子又可以领了。

    删不到的（False）别人已经收了尾：同一事务里什么也不该再记。删到的，别人等到提交就删不到。
    """
    return connection.execute(sa.delete(leases).where(leases.c.run_id == run_id, _is_expired())).rowcount == 1


@lru_cache(maxsize=8)
def _oldest_island(target: str) -> sa.Select[Any]:
    """等得最久的一段：头、尾、起点、能领的日子共有几个、上次失败的运行（最小的与最大的）。每次领都要，只建一次。"""
    due = _claimable_days(target)
    # 连续的日子减去行号得同一个值，于是每段连续、同起点的日子成一组
    island = due.c.day - sa.cast(sa.func.row_number().over(partition_by=due.c.start, order_by=due.c.day), sa.Integer)
    islands = sa.select(due.c.day, due.c.start, due.c.since, due.c.failed_run_id, island.label("island")).subquery("islands")
    oldest = sa.select(islands).order_by(islands.c.since, islands.c.day).limit(1).subquery("oldest")
    reach = oldest.c.day + (MAX_DAYS_PER_RUN - 1)
    return (
        sa.select(
            sa.func.min(islands.c.day),
            sa.func.max(islands.c.day),
            sa.func.min(islands.c.start),
            sa.select(sa.func.count()).select_from(due).scalar_subquery(),
            sa.func.min(islands.c.failed_run_id),
            sa.func.max(islands.c.failed_run_id),
        )
        .join(oldest, sa.and_(islands.c.island == oldest.c.island, islands.c.start == oldest.c.start))
        .where(islands.c.day.between(oldest.c.day, reach))
    )


def _claimable_days(target: str) -> sa.Subquery:
    """一行一个能领的日子：start 是第一个到期资产在链上的位置（从 1 起），since 是等了最久的要求。"""
    position = sa.func.array_position(sa.cast(list(ASSETS), sa.ARRAY(sa.Text)), ledger.c.asset, type_=sa.Integer())
    leased = (
        sa.select(leases.c.run_id).where(leases.c.target == target, ledger.c.day.between(leases.c.first_day, leases.c.last_day)).exists()
    )
    return (
        sa.select(
            ledger.c.day,
            sa.func.min(position).label("start"),
            sa.func.min(ledger.c.requested_at).label("since"),
            sa.func.min(ledger.c.failed_run_id).label("failed_run_id"),
        )
        .where(
            ledger.c.target == target,
            ledger.c.requested > ledger.c.materialized,
            ledger.c.held_reason.is_(None),
            sa.or_(ledger.c.retry_at.is_(None), ledger.c.retry_at <= sa.func.clock_timestamp()),
            ~_is_in_a_rush(),
            ~leased,
        )
        .group_by(ledger.c.day)
        .subquery("due")
    )


def _is_in_a_rush() -> sa.ColumnElement[bool]:
    """刚做完，又积下了许多导入，还在来：等一等，几千个事件才不会一个运行接着一个运行。从没做过的日子不等。"""
    waiting = (
        sa.select(import_requests.c.import_id)
        .where(
            import_requests.c.target == ledger.c.target,
            import_requests.c.day == ledger.c.day,
            import_requests.c.revision > ledger.c.materialized,
        )
        .correlate(ledger)
        .limit(RUSH_IMPORTS + 1)
        .subquery("waiting")
    )
    recent = sa.and_(ledger.c.requested_at > _in(-RUSH_QUIET_SECONDS), ledger.c.materialized_at > _in(-RUSH_PATIENCE_SECONDS))
    many = sa.select(sa.func.count()).select_from(waiting).scalar_subquery() > RUSH_IMPORTS
    return sa.case((recent, many), else_=sa.false())


def _state(row: sa.Row[tuple[object]] | None) -> LeaseState:
    if row is None:
        return LeaseState.LOST
    return LeaseState.HELD if row[0] is None else LeaseState.CANCEL_REQUESTED


def _named(lease: Lease) -> dict[str, object]:
    return {"of_run": lease.run_id, "of_token": lease.token}


def _is_expired() -> sa.ColumnElement[bool]:
    return leases.c.expires_at <= sa.func.clock_timestamp()


def _in(seconds: float | sa.ColumnElement[float]) -> sa.ColumnElement[object]:
    return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)


_ACQUIRE = (
    pg.insert(leases)
    .values(
        {column.name: sa.bindparam(column.name, type_=column.type) for column in leases.c["run_id", "token", "owner", "target"]}
        | {name: sa.bindparam(name, type_=sa.Date) for name in ("first_day", "last_day")}
        | {"expires_at": _in(sa.bindparam("seconds", type_=sa.Float))}
    )
    .on_conflict_do_nothing()
    .returning(leases.c.run_id)
)
_HELD = sa.and_(
    leases.c.run_id == sa.bindparam("of_run"),
    leases.c.token == sa.bindparam("of_token"),
    leases.c.expires_at > sa.func.clock_timestamp(),
)
_LOCK_HELD = sa.select(leases.c.run_id).where(_HELD).with_for_update(read=True)
