"""租约：哪个运行正占着哪些天，以数据库的时钟为准；提交数据之前再查一次（栅栏）。"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import LeaseLostError
from etl_assets.core.etl_tables import leases

_FRESH_SECONDS = 1.0


@dataclass(frozen=True)
class Lease:
    """一次运行对一段日子的占有。"""

    run_id: str
    token: UUID
    asked_at: float = field(default_factory=time.monotonic, compare=False)

    def is_fresh(self) -> bool:
        """刚要来的：租约比这长得多，不必问它还在不在。"""
        return time.monotonic() - self.asked_at < _FRESH_SECONDS


class LeaseState(StrEnum):
    """心跳看到的租约。"""

    VALID = "valid"
    CANCEL_REQUESTED = "cancel_requested"
    LOST = "lost"


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""正在执行的运行的租约；没有租约（dagster dev、测试）时不设栅栏，数据锁照样有效。"""


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
    return lease if connection.execute(_ACQUIRE, values).first() else None


def extend_lease(connection: sa.Connection, lease: Lease, *, lease_seconds: float) -> LeaseState:
    """心跳：还持有时延长，并看有没有人要取消。"""
    extended = (
        sa.update(leases)
        # 过了期就续不回来：别的工人可能正在给它收尾，迟来的心跳不能叫它又活过来
        .where(_VALID)
        .values(expires_at=in_seconds(lease_seconds))
        .returning(leases.c.cancel_requested_at)
    )
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


def read_acquired_at(connection: sa.Connection, lease: Lease) -> datetime | None:
    """运行何时占有了它的日子；租约早已不是我们的，是 None。"""
    return connection.scalar(
        sa.select(leases.c.acquired_at).where(leases.c.run_id == lease.run_id, leases.c.token == lease.token)
    )


def release_lease(connection: sa.Connection, lease: Lease) -> LeaseState:
    """运行结束，不论成败；返回放手时的租约：期间有没有人要取消，或者早已不是我们的。"""
    # 连 token 一起认：冻住过的工人醒来时，同一个运行的租约也许已是别人的
    own = sa.delete(leases).where(leases.c.run_id == lease.run_id, leases.c.token == lease.token)
    return _state(connection.execute(own.returning(leases.c.cancel_requested_at)).first())


def fence() -> tuple[Sequence[sa.Select[Any]], Mapping[str, object]]:
    """栅栏：在数据事务里锁住租约行直到提交。它的语句与参数，与别的一起发；它的行交给 `judge_fence`。没有租约就没有语句。"""
    lease = current_lease.get()
    return ([_LOCK_VALID], _named(lease)) if lease is not None else ([], {})


def judge_fence(locked: Sequence[object]) -> None:
    """:raises LeaseLostError: 有租约，却没有锁到它；事务随之回滚。"""
    lease = current_lease.get()
    if lease is not None and not locked:
        raise LeaseLostError(lease.run_id)


def read_expired_leases(connection: sa.Connection, target: str) -> Sequence[sa.Row[tuple[str, bool]]]:
    """过期的租约的 run_id 与 is_cancelled：持有者已死或被隔离，它们的运行不会再提交，租约也续不回来。

    它们的日子还占着，直到有人收了尾、删去租约：重来的运行才知道自己接着谁。
    """
    is_cancelled = leases.c.cancel_requested_at.is_not(None).label("is_cancelled")
    return connection.execute(sa.select(leases.c.run_id, is_cancelled).where(leases.c.target == target, _EXPIRED)).all()


def delete_expired_lease(connection: sa.Connection, run_id: str) -> bool:
    """收了尾：它的日子又可以领了。

    删不到的（False）别人已经收了尾：同一事务里什么也不该再记。删到的，别人等到提交就删不到。
    """
    return connection.execute(sa.delete(leases).where(leases.c.run_id == run_id, _EXPIRED)).rowcount == 1


def in_seconds(seconds: float | sa.ColumnElement[float]) -> sa.ColumnElement[object]:
    """SQL：这么久以后，以数据库的时钟为准。"""
    return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _state(row: sa.Row[tuple[object]] | None) -> LeaseState:
    if row is None:
        return LeaseState.LOST
    return LeaseState.VALID if row[0] is None else LeaseState.CANCEL_REQUESTED


def _named(lease: Lease) -> dict[str, object]:
    return {"of_run": lease.run_id, "of_token": lease.token}


_EXPIRED = leases.c.expires_at <= sa.func.clock_timestamp()
# 同一个运行的消息可能送到两次：后来的撞上主键，看见租约就走开
_ACQUIRE = sa.text("""
    INSERT INTO etl.leases (run_id, token, owner, target, first_day, last_day, expires_at)
    VALUES (:run_id, :token, :owner, :target, :first_day, :last_day, clock_timestamp() + make_interval(secs => :seconds))
    ON CONFLICT DO NOTHING RETURNING run_id""").bindparams(sa.bindparam("token", type_=sa.Uuid))
_VALID = sa.and_(
    leases.c.run_id == sa.bindparam("of_run"),
    leases.c.token == sa.bindparam("of_token"),
    leases.c.expires_at > sa.func.clock_timestamp(),
)
# 锁到提交，不只是看一眼：看过之后才过期的，收尾的人要等我们提交才删得掉租约，于是看得见做完了什么
_LOCK_VALID = sa.select(leases.c.run_id).where(_VALID).with_for_update(read=True)
