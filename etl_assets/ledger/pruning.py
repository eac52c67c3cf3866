"""每天清一次过了保留期的：一次只有一个在清，忘到了哪里记在 etl.retention。时刻以数据库的时钟为准。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from etl_assets.core.etl_tables import leases, ledger, retention
from etl_assets.ledger.leases import in_seconds

_NOW = sa.func.clock_timestamp()
_IS_FREE = sa.or_(retention.c.claimed_until.is_(None), retention.c.claimed_until < _NOW)


def claim_pruning(connection: sa.Connection, *, due_since: datetime | None, seconds: float) -> bool:
    """要来这一次；别人正在清、或 due_since 之后清完过，就是 False。死在半路的，过了期别人从头再清。"""
    is_due = sa.true() if due_since is None else sa.func.coalesce(retention.c.finished_at < due_since, sa.true())
    claimed = sa.update(retention).where(_IS_FREE, is_due).values(claimed_until=in_seconds(seconds))
    return connection.execute(claimed).rowcount == 1


def extend_pruning(connection: sa.Connection, *, seconds: float) -> None:
    """一口清完，还要接着清。"""
    connection.execute(sa.update(retention).values(claimed_until=in_seconds(seconds)))


def release_pruning(connection: sa.Connection, *, is_finished: bool, again_in_seconds: float = 0.0) -> None:
    """清完了，或者清不下去了：隔这么久可以再来。"""
    done = {"finished_at": _NOW} if is_finished else {}
    until = in_seconds(again_in_seconds) if again_in_seconds else None
    connection.execute(sa.update(retention).values(claimed_until=until, **done))


def note_forgotten(connection: sa.Connection, until: datetime) -> None:
    """在那之前处理完的导入，台账的簿记从此可能没有了。"""
    connection.execute(
        sa.update(retention).values(forgotten_until=sa.func.greatest(retention.c.forgotten_until, until))
    )


def last_finished(connection: sa.Connection) -> datetime | None:
    """上次何时清完；从没有过是 None。"""
    return connection.scalar(sa.select(retention.c.finished_at))


def runs_in_use(connection: sa.Connection) -> Sequence[str]:
    """台账还要的运行，不论写到哪个 schema：正在做的，到期的日子要接着的。"""
    failed = sa.select(ledger.c.failed_run_id).where(
        ledger.c.requested > ledger.c.materialized, ledger.c.failed_run_id.is_not(None)
    )
    return connection.scalars(failed.union(sa.select(leases.c.run_id))).all()
