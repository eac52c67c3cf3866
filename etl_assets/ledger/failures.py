"""没做成的日子：过一会儿再试，或者搁置，直到有新的要求。"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import assets, ledger
from etl_assets.core.tables import TIMESTAMP
from etl_assets.core.text import storable
from etl_assets.ledger.graph import LINE

MAX_FAILURES = 5
FAILED_DAY = Backoff(first_seconds=5.0, longest_seconds=60.0)

Failure = Literal["transient", "permanent", "unknown"]
"""失败的种类，决定何时再试。"""


def record_failure(
    connection: sa.Connection,
    target: str,
    failed: Collection[str],
    days: DayRange,
    *,
    reason: str,
    kind: Failure,
    run_id: str | None = None,
    began_at: datetime | None = None,
    backoff: Backoff = FAILED_DAY,
) -> list[str]:
    """这些资产没做成：还到期的日子稍后再试，或者搁置，直到有新的要求；返回有这样的日子的资产，次序照旧。

    :param kind: transient 的原因在外面，等得越久试得越疏，不计次数；permanent 重试无用，立刻搁置；unknown 间隔翻倍，次数用尽搁置。
    :param began_at: 运行何时开始。此后又有人要求的日子不搁置：他也许正为此改好了什么，这个运行却没看见。run_id 自己交下去的不算。
    """
    overdue = _overdue(target, failed, days)
    _lock(connection, overdue)
    waited = sa.func.extract("epoch", sa.func.clock_timestamp() - ledger.c.requested_at)
    backoff_seconds = {
        "transient": sa.func.least(sa.func.greatest(waited / 2, backoff.first_seconds), backoff.longest_seconds),
        "permanent": sa.literal(backoff.first_seconds),
        "unknown": backoff.seconds_in_sql(ledger.c.failures + 1),
    }[kind]
    failures = ledger.c.failures + (0 if kind == "transient" else 1)
    held = sa.and_(sa.or_(sa.literal(kind == "permanent"), failures >= MAX_FAILURES), ~_requested_since(target, began_at, run_id))
    retry_at = sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, backoff_seconds)
    recorded = set(
        connection.scalars(
            sa.update(ledger)
            .where(overdue)
            .values(
                failures=failures,
                retry_at=sa.case((held, None), else_=retry_at),
                held_reason=sa.case((held, storable(reason)), else_=None),
                failed_run_id=run_id,
            )
            .returning(ledger.c.asset)
        )
    )
    return [asset for asset in failed if asset in recorded]


def unfinished_assets(connection: sa.Connection, target: str, run_id: str, made: Iterable[str], days: DayRange) -> list[str]:
    """这个运行还没有做完每一天的资产，次序照旧：做完的已经提交了，不管运行后来怎样结束。"""
    own = sa.and_(ledger.c.target == target, days.includes(ledger.c.day), ledger.c.run_id == run_id)
    counts = sa.select(ledger.c.asset, sa.func.count()).where(own).group_by(ledger.c.asset)
    done = dict(connection.execute(counts).tuples().all())
    return [asset for asset in made if done.get(asset, 0) < len(days)]


def hold_days(connection: sa.Connection, target: str, held: Iterable[str], days: DayRange, *, reason: str) -> None:
    """搁置还到期的日子，直到有新的要求：有人取消了做它们的运行。"""
    overdue = _overdue(target, held, days)
    _lock(connection, overdue)
    connection.execute(sa.update(ledger).where(overdue).values(retry_at=None, held_reason=reason))


def _overdue(target: str, names: Iterable[str], days: DayRange) -> sa.ColumnElement[bool]:
    return sa.and_(
        ledger.c.target == target,
        ledger.c.asset.in_(list(names)),
        days.includes(ledger.c.day),
        ledger.c.requested > ledger.c.materialized,
    )


def _requested_since(target: str, moment: datetime | None, run_id: str | None) -> sa.ColumnElement[bool]:
    """它或它依赖的，这一天在 moment 之后又有要求；不是 run_id 刚做完上游、自己交下去的那一个。"""
    asked, made = ledger.alias("asked"), ledger.alias("made")
    passed_on = sa.select(made.c.day).where(
        made.c.target == target, made.c.day == asked.c.day, made.c.run_id == run_id, made.c.materialized_at == asked.c.requested_at
    )
    return (
        sa.select(asked.c.day)
        .join(assets, sa.and_(assets.c.target == asked.c.target, sa.any_(LINE) == asked.c.asset))
        .where(assets.c.asset == ledger.c.asset, asked.c.target == target, asked.c.day == ledger.c.day)
        .where(asked.c.requested_at > sa.literal(moment, TIMESTAMP), ~passed_on.exists())
        .exists()
    )


def _lock(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> None:
    """按固定次序锁住台账行，再改它们。"""
    connection.execute(sa.select(ledger.c.day).where(condition).order_by(ledger.c.day, ledger.c.asset).with_for_update()).all()
