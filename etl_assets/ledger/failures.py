"""没做成的日子：过一会儿再试，或者搁置，直到有新的要求；失败的运行记几天，给 `etl status` 看。"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import DO_NOT_ADD_UP, FailureKind
from etl_assets.core.etl_tables import assets, failed_runs, ledger
from etl_assets.core.log import redact
from etl_assets.core.tables import TIMESTAMP
from etl_assets.core.text import storable
from etl_assets.ledger.graph import LINE

MAX_FAILURES = 5
FAILED_DAY = Backoff(first_seconds=5.0, longest_seconds=60.0)
_KEPT = timedelta(days=7)
_REASON_CHARACTERS = 500
_SHOWN = 20


def record_failure(
    connection: sa.Connection,
    target: str,
    failed: Collection[str],
    days: DayRange,
    *,
    reason: str,
    kind: FailureKind,
    run_id: str | None = None,
    began_at: datetime | None = None,
    backoff: Backoff = FAILED_DAY,
) -> list[str]:
    """这些资产没做成：还到期的日子稍后再试，或者搁置，直到有新的要求；返回有这样的日子的资产，次序照旧。

    :param kind: transient、refused 的原因在外面，等得越久试得越疏，不计次数；permanent 重试无用，立刻搁置；unknown 间隔翻倍，次数用尽搁置。
    :param began_at: 运行何时开始。此后又有人要求的日子不搁置：他也许正为此改好了什么，这个运行却没看见。run_id 自己交下去的不算。
    """
    overdue = _overdue(target, failed, days)
    _lock(connection, overdue)
    waited = sa.func.extract("epoch", sa.func.clock_timestamp() - ledger.c.requested_at)
    # 不看次数，等了多久就再等它的一半：数据库离开五分钟，不该把一天的几次机会都用光
    passing = sa.func.least(sa.func.greatest(waited / 2, backoff.first_seconds), backoff.longest_seconds)
    backoff_seconds = {
        "transient": passing,
        "refused": passing,
        "permanent": sa.literal(backoff.first_seconds),
        "unknown": backoff.seconds_in_sql(ledger.c.failures + 1),
    }[kind]
    failures = ledger.c.failures + (0 if kind in ("transient", "refused") else 1)
    held = sa.and_(
        sa.or_(sa.literal(kind == "permanent"), failures >= MAX_FAILURES), ~_requested_since(target, began_at, run_id)
    )
    retry_at = sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, backoff_seconds)
    recorded = set(
        connection.scalars(
            sa.update(ledger)
            .where(overdue)
            .values(
                failures=failures,
                retry_at=sa.case((held, None), else_=retry_at),
                held_reason=sa.case((held, storable(reason)), else_=None),
                # 下一个做这些日子的运行由此知道自己接着谁
                failed_run_id=run_id,
            )
            .returning(ledger.c.asset)
        )
    )
    return [asset for asset in failed if asset in recorded]


def note_failed_run(
    connection: sa.Connection, target: str, days: DayRange, *, asset: str, run_id: str, reason: str
) -> None:
    """记下哪个运行的哪个资产失败了与缘由的头一句；顺手删去旧的，没有谁专门来清。账还不平的不删：告警由它们而来。"""
    first_line = next((line for line in storable(reason).splitlines() if line.strip()), "it gave no reason")
    values = {"reason": redact(first_line.strip())[:_REASON_CHARACTERS], "failed_at": sa.func.clock_timestamp()}
    insert = pg.insert(failed_runs).values(
        target=target, run_id=run_id, asset=asset, first_day=days.first, last_day=days.last, **values
    )
    connection.execute(insert.on_conflict_do_update(index_elements=["target", "run_id", "asset"], set_=values))
    is_old = failed_runs.c.failed_at < sa.func.clock_timestamp() - _KEPT
    connection.execute(
        sa.delete(failed_runs).where(failed_runs.c.target == target, is_old, ~(_of_accounts() & _undone().exists()))
    )


def unbalanced_days(connection: sa.Connection, target: str) -> Sequence[sa.RowMapping]:
    """账不平而失败、此后还没有做成的，新的在前：资产、最早的那一天、缘由。不看过了多久，再次要求也不算好了。"""
    first = _undone().with_only_columns(sa.func.min(ledger.c.day)).scalar_subquery()
    statement = (
        sa.select(failed_runs.c.asset, first.label("day"), failed_runs.c.reason)
        .where(failed_runs.c.target == target, _of_accounts(), _undone().exists())
        .order_by(failed_runs.c.failed_at.desc())
        .limit(_SHOWN)
    )
    return connection.execute(statement).mappings().all()


def _of_accounts() -> sa.ColumnElement[bool]:
    return sa.func.strpos(failed_runs.c.reason, DO_NOT_ADD_UP) > 0


def _undone() -> sa.Select[Any]:
    """failed_runs 的这个运行的日子里，还到期、它失败之后没有做成过的。"""
    return (
        sa.select(ledger.c.day)
        .where(
            ledger.c.target == failed_runs.c.target,
            ledger.c.asset == failed_runs.c.asset,
            ledger.c.day.between(failed_runs.c.first_day, failed_runs.c.last_day),
            ledger.c.requested > ledger.c.materialized,
            sa.func.coalesce(ledger.c.materialized_at < failed_runs.c.failed_at, sa.true()),
        )
        .correlate(failed_runs)
    )


def unfinished_assets(
    connection: sa.Connection, target: str, run_id: str, made: Iterable[str], days: DayRange
) -> list[str]:
    """这个运行还没有做完每一天的资产，次序照旧：做完的已经提交了，不管运行后来怎样结束。"""
    own = sa.and_(ledger.c.target == target, days.includes(ledger.c.day), ledger.c.run_id == run_id)
    counts = sa.select(ledger.c.asset, sa.func.count()).where(own).group_by(ledger.c.asset)
    done = dict(connection.execute(counts).tuples().all())
    return [asset for asset in made if done.get(asset, 0) < len(days)]


def hold_days(connection: sa.Connection, target: str, held: Iterable[str], days: DayRange, *, cancelled: str) -> None:
    """有人取消了做它们的运行：没做成的日子搁置，直到有新的要求。"""
    overdue = _overdue(target, held, days)
    _lock(connection, overdue)
    connection.execute(
        sa.update(ledger).where(overdue).values(retry_at=None, held_reason=f"run {cancelled} was cancelled")
    )


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
        made.c.target == target,
        made.c.day == asked.c.day,
        made.c.run_id == run_id,
        # passing_on 把做完与交下去写成同一个时刻，凭它认出；别人后来要求的，时刻不同
        made.c.materialized_at == asked.c.requested_at,
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
    connection.execute(
        sa.select(ledger.c.day).where(condition).order_by(ledger.c.day, ledger.c.asset).with_for_update()
    ).all()
