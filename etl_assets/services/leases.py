"""租约：哪个运行正占着哪些天，以数据库的时钟为准；提交数据之前再查一次（栅栏）。"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import LeaseLostError
from etl_assets.core.tables import leases, ledger
from etl_assets.services.ledger import ASSETS
from etl_assets.services.locks import acquire_locks

MAX_DAYS_PER_RUN = 30


@dataclass(frozen=True)
class Lease:
    """一次运行对一段日子的占有。"""

    run_id: str
    token: UUID


@dataclass(frozen=True)
class Claim:
    """领到的工作：这段日子从 assets[0] 起都要做；more 表示还有别的到期日子没人做。"""

    lease: Lease
    days: DayRange
    assets: tuple[str, ...]
    more: bool


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""正在执行的运行的租约；没有租约（dagster dev、测试）时不设栅栏，数据锁照样有效。"""


def claim_due_days(connection: sa.Connection, target: str, *, run_id: str, owner: str, lease_seconds: float) -> Claim | None:
    """领走等得最久的一段到期日子（连续、同一个起点资产、至多 30 天）；没有可领的是 None。"""
    acquire_locks(connection, target, "claim", [0])
    due = _claimable_days(target)
    # 连续的日子减去行号得同一个值，于是每段连续、同起点的日子成一组
    island = due.c.day - sa.cast(sa.func.row_number().over(partition_by=due.c.start, order_by=due.c.day), sa.Integer)
    islands = sa.select(due.c.day, due.c.start, due.c.since, island.label("island")).subquery("islands")
    oldest = sa.select(islands).order_by(islands.c.since, islands.c.day).limit(1).subquery("oldest")
    reach = oldest.c.day + (MAX_DAYS_PER_RUN - 1)
    chosen = connection.execute(
        sa.select(
            sa.func.min(islands.c.day),
            sa.func.max(islands.c.day),
            sa.func.min(islands.c.start),
            sa.select(sa.func.count()).select_from(due).scalar_subquery(),
        )
        .join(oldest, sa.and_(islands.c.island == oldest.c.island, islands.c.start == oldest.c.start))
        .where(islands.c.day.between(oldest.c.day, reach))
    ).one()
    first, last, start, available = chosen
    if first is None:
        return None
    days = DayRange(first, last)
    lease = acquire_lease(connection, target, days, run_id=run_id, owner=owner, lease_seconds=lease_seconds)
    return Claim(lease=lease, days=days, assets=ASSETS[start - 1 :], more=available > len(days))


def has_claimable_days(connection: sa.Connection, target: str) -> bool:
    """有没有到期、没人做、也不在等重试的日子。"""
    return bool(connection.execute(sa.select(sa.select(_claimable_days(target).c.day).exists())).scalar())


def acquire_lease(connection: sa.Connection, target: str, days: DayRange, *, run_id: str, owner: str, lease_seconds: float) -> Lease:
    """给一次运行记下租约。"""
    lease = Lease(run_id=run_id, token=uuid4())
    connection.execute(
        sa.insert(leases).values(
            run_id=run_id,
            token=lease.token,
            owner=owner,
            target=target,
            first_day=days.first,
            last_day=days.last,
            expires_at=_in(lease_seconds),
        )
    )
    return lease


def extend_lease(connection: sa.Connection, lease: Lease, *, lease_seconds: float) -> bool:
    """心跳：还持有时延长；已过期或易主时返回 False。"""
    extended = connection.execute(sa.update(leases).where(_held(lease)).values(expires_at=_in(lease_seconds)))
    return extended.rowcount == 1


def release_lease(connection: sa.Connection, lease: Lease) -> None:
    """运行结束，不论成败。"""
    connection.execute(sa.delete(leases).where(leases.c.run_id == lease.run_id, leases.c.token == lease.token))


def assert_lease_held(connection: sa.Connection) -> None:
    """栅栏：在数据事务里锁住租约行直到提交；租约不在就抛 LeaseLostError，事务随之回滚。"""
    lease = current_lease.get()
    if lease is None:
        return
    held = connection.execute(sa.select(leases.c.run_id).where(_held(lease)).with_for_update(read=True)).first()
    if held is None:
        raise LeaseLostError(lease.run_id)


def take_expired_leases(connection: sa.Connection, target: str) -> list[str]:
    """删去过期的租约，返回它们的 run_id：持有者已死或被隔离，它们的运行不会再提交。"""
    expired = sa.delete(leases).where(leases.c.target == target, leases.c.expires_at <= sa.func.clock_timestamp())
    return list(connection.scalars(expired.returning(leases.c.run_id)).all())


def _claimable_days(target: str) -> sa.Subquery:
    """一行一个能领的日子：start 是第一个到期资产在链上的位置（从 1 起），since 是等了最久的要求。"""
    position = sa.func.array_position(sa.cast(list(ASSETS), sa.ARRAY(sa.Text)), ledger.c.asset, type_=sa.Integer())
    leased = (
        sa.select(leases.c.run_id)
        .where(
            leases.c.target == target,
            ledger.c.day.between(leases.c.first_day, leases.c.last_day),
            leases.c.expires_at > sa.func.clock_timestamp(),
        )
        .exists()
    )
    return (
        sa.select(ledger.c.day, sa.func.min(position).label("start"), sa.func.min(ledger.c.requested_at).label("since"))
        .where(
            ledger.c.target == target,
            ledger.c.requested > ledger.c.materialized,
            ledger.c.held_reason.is_(None),
            sa.or_(ledger.c.retry_at.is_(None), ledger.c.retry_at <= sa.func.clock_timestamp()),
            ~leased,
        )
        .group_by(ledger.c.day)
        .subquery("due")
    )


def _held(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(leases.c.run_id == lease.run_id, leases.c.token == lease.token, leases.c.expires_at > sa.func.clock_timestamp())


def _in(seconds: float) -> sa.ColumnElement[object]:
    return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)
