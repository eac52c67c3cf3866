"""台账：每个资产的每一天被要求到哪个版本、做到了哪个版本。requested > materialized 就是到期。

同一天的三个资产共用一条数轴：订单的 requested 由导入抬高，下游的 requested 就是上游的 materialized，
所以 leads 做到了某个版本，就说明那个版本的导入已走完全程。
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import import_requests, ledger
from etl_assets.services.vectorized_queries import read_frame

ASSETS = ("orders", "customers", "leads")
"""资产链，上游在前；要在中间插入一个资产，就插进这里。"""

MAX_FAILURES = 5
_FIRST_RETRY_SECONDS = 5


@dataclass(frozen=True)
class Revisions:
    """运行读数据之前读到的台账：一行一天（day、requested、is_due）。"""

    frame: pl.DataFrame


def up_to(asset: str) -> list[str]:
    """资产链上到 asset 为止的资产，含它自己。"""
    return list(ASSETS[: ASSETS.index(asset) + 1])


def after(asset: str) -> list[str]:
    """紧跟在 asset 后面的资产；末尾的没有。"""
    return list(ASSETS[ASSETS.index(asset) + 1 :][:1])


def before(asset: str) -> str:
    """紧排在 asset 前面的资产；链头没有。"""
    return ASSETS[ASSETS.index(asset) - 1]


def ensure_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """让这些天的每个资产都有一行。"""
    pairs = [(day, asset) for day in sorted(set(days)) for asset in sorted(ASSETS)]
    pair = (
        sa.func.unnest(sa.cast([day for day, _ in pairs], sa.ARRAY(sa.Date)), sa.cast([asset for _, asset in pairs], sa.ARRAY(sa.Text)))
        .table_valued("day", "asset", name="pair")
        .render_derived()
    )
    rows = sa.select(sa.literal(target), pair.c.asset, pair.c.day).order_by(pair.c.day, pair.c.asset)
    connection.execute(pg.insert(ledger).from_select(["target", "asset", "day"], rows).on_conflict_do_nothing())


def request_days(connection: sa.Connection, target: str, days: Iterable[date], *, allow_deletes: bool = False) -> None:
    """要求从订单起重做这些天：订单的 requested 加一，先前的失败与搁置一笔勾销。"""
    wanted = sorted(set(days))
    if not wanted:
        return
    ensure_days(connection, target, wanted)
    condition = sa.and_(ledger.c.target == target, ledger.c.day == sa.any_(sa.cast(wanted, sa.ARRAY(sa.Date))))
    _lock(connection, condition)
    connection.execute(
        sa.update(ledger)
        .where(condition, ledger.c.asset == ASSETS[0])
        .values(
            requested=ledger.c.requested + 1,
            requested_at=sa.func.clock_timestamp(),
            allow_deletes=sa.or_(ledger.c.allow_deletes, sa.literal(allow_deletes)),
        )
    )
    connection.execute(sa.update(ledger).where(condition).values(failures=0, retry_at=None, held_reason=None, failed_run_id=None))


def request_downstream(connection: sa.Connection, target: str, asset: str, days: Iterable[date]) -> None:
    """别处的 ETL 做完了 asset 的这些天：让它后面的资产到期。

    上游自己还到期的日子不必动：它做完时下游自然到期。
    """
    wanted = sorted(set(days))
    if not wanted or not after(asset):
        return
    ensure_days(connection, target, wanted)
    in_days = ledger.c.day == sa.any_(sa.cast(wanted, sa.ARRAY(sa.Date)))
    _lock(connection, sa.and_(ledger.c.target == target, in_days))
    _advance(connection, target, asset, in_days)
    _pass_on(connection, target, asset, in_days)


def read_revisions(connection: sa.Connection, target: str, asset: str, days: DayRange) -> Revisions:
    """在读数据之前读：此后提交的要求不算在这次运行头上。"""
    ensure_days(connection, target, days)
    return Revisions(
        read_frame(
            connection,
            sa.select(ledger.c.day, ledger.c.requested, (ledger.c.requested > ledger.c.materialized).label("is_due")).where(
                ledger.c.target == target, ledger.c.asset == asset, days.includes(ledger.c.day)
            ),
        )
    )


def days_allowing_deletes(target: str, days: DayRange) -> sa.Select[Any]:
    """有人明确允许大量删除的日子。"""
    return sa.select(ledger.c.day).where(
        ledger.c.target == target, ledger.c.asset == ASSETS[0], days.includes(ledger.c.day), ledger.c.allow_deletes
    )


def mark_materialized(
    connection: sa.Connection, target: str, asset: str, days: DayRange, revisions: Revisions, *, run_id: str
) -> list[UUID]:
    """在写数据的事务里记下：这些天做到了读数据之前的版本；返回因此完成的导入。

    没有到期的日子（有人重跑）各加一个新版本，好让下游也到期；若上游这时又到期了就不加，它做完时下游自然到期。
    """
    in_days = days.includes(ledger.c.day)
    _lock(connection, sa.and_(ledger.c.target == target, in_days))
    due = revisions.frame.filter("is_due")
    reruns = revisions.frame.filter(~pl.col("is_due"))["day"].to_list()
    seen = sa.select(
        sa.func.unnest(sa.cast(due["day"].to_list(), sa.ARRAY(sa.Date))).label("day"),
        sa.func.unnest(sa.cast(due["requested"].to_list(), sa.ARRAY(sa.BigInteger))).label("revision"),
    ).subquery("seen")
    own = sa.and_(ledger.c.target == target, ledger.c.asset == asset)
    finished = connection.scalars(
        sa.select(import_requests.c.import_id.distinct())
        .join(ledger, sa.and_(own, ledger.c.day == import_requests.c.day))
        .join(seen, seen.c.day == ledger.c.day)
        .where(
            import_requests.c.target == target,
            import_requests.c.revision > ledger.c.materialized,
            import_requests.c.revision <= seen.c.revision,
        )
        .order_by(import_requests.c.import_id)
    ).all()
    connection.execute(
        sa.update(ledger)
        .where(own, ledger.c.day == seen.c.day)
        .values(materialized=sa.func.greatest(ledger.c.materialized, seen.c.revision))
    )
    _advance(connection, target, asset, ledger.c.day == sa.any_(sa.cast(reruns, sa.ARRAY(sa.Date))))
    connection.execute(
        sa.update(ledger)
        .where(own, in_days)
        .values(
            materialized_at=sa.func.clock_timestamp(),
            run_id=run_id,
            failures=0,
            retry_at=None,
            held_reason=None,
            failed_run_id=None,
            allow_deletes=sa.and_(ledger.c.allow_deletes, ledger.c.requested > ledger.c.materialized),
        )
    )
    _pass_on(connection, target, asset, in_days)
    return list(finished)


def waiting_imports(connection: sa.Connection, target: str, asset: str, days: DayRange) -> list[UUID]:
    """还在等这个资产的这些天的导入。"""
    own = sa.and_(ledger.c.target == target, ledger.c.asset == asset, ledger.c.day == import_requests.c.day)
    waiting = (
        sa.select(import_requests.c.import_id.distinct())
        .join(ledger, own)
        .where(import_requests.c.target == target, days.includes(import_requests.c.day), import_requests.c.revision > ledger.c.materialized)
        .order_by(import_requests.c.import_id)
    )
    return list(connection.scalars(waiting))


def record_failure(
    connection: sa.Connection,
    target: str,
    assets: Iterable[str],
    days: DayRange,
    *,
    reason: str,
    permanent: bool,
    run_id: str | None = None,
    first_retry_seconds: float = _FIRST_RETRY_SECONDS,
) -> None:
    """运行失败：还到期的日子稍后再试，间隔翻倍；重试无用或次数用尽的就搁置，直到有新的要求。"""
    overdue = _overdue(target, assets, days)
    _lock(connection, overdue)
    failures = ledger.c.failures + 1
    held = sa.or_(sa.literal(permanent), failures >= MAX_FAILURES)
    delay = sa.func.make_interval(0, 0, 0, 0, 0, 0, first_retry_seconds * sa.func.power(2, ledger.c.failures))
    connection.execute(
        sa.update(ledger)
        .where(overdue)
        .values(
            failures=failures,
            retry_at=sa.case((held, None), else_=sa.func.clock_timestamp() + delay),
            held_reason=sa.case((held, reason), else_=None),
            failed_run_id=run_id,
        )
    )


def hold_days(connection: sa.Connection, target: str, assets: Iterable[str], days: DayRange, *, reason: str) -> None:
    """搁置还到期的日子，直到有新的要求：有人取消了做它们的运行。"""
    overdue = _overdue(target, assets, days)
    _lock(connection, overdue)
    connection.execute(sa.update(ledger).where(overdue).values(retry_at=None, held_reason=reason))


def _overdue(target: str, assets: Iterable[str], days: DayRange) -> sa.ColumnElement[bool]:
    return sa.and_(
        ledger.c.target == target,
        ledger.c.asset.in_(list(assets)),
        days.includes(ledger.c.day),
        ledger.c.requested > ledger.c.materialized,
    )


def _lock(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> None:
    """按固定次序锁住台账行，再分几条语句改它们。"""
    connection.execute(sa.select(ledger.c.day).where(condition).order_by(ledger.c.day, ledger.c.asset).with_for_update()).all()


def _advance(connection: sa.Connection, target: str, asset: str, condition: sa.ColumnElement[bool]) -> None:
    """把链上到 asset 为止都没有到期的日子推进一个版本，整条链一起动，数轴才保持一致。"""
    chain = ledger.alias("chain")
    behind = (
        sa.select(chain.c.day)
        .where(
            chain.c.target == target,
            chain.c.day == ledger.c.day,
            chain.c.asset.in_(up_to(asset)),
            chain.c.requested > chain.c.materialized,
        )
        .exists()
    )
    connection.execute(
        sa.update(ledger)
        .where(ledger.c.target == target, ledger.c.asset.in_(up_to(asset)), condition, ~behind)
        .values(requested=ledger.c.requested + 1, materialized=ledger.c.requested + 1)
    )


def _pass_on(connection: sa.Connection, target: str, asset: str, condition: sa.ColumnElement[bool]) -> None:
    """下游的 requested 就是上游的 materialized；有新要求时搁置与失败一笔勾销。"""
    upstream = ledger.alias("upstream")
    connection.execute(
        sa.update(ledger)
        .where(
            ledger.c.target == target,
            ledger.c.asset.in_(after(asset)),
            condition,
            upstream.c.target == target,
            upstream.c.asset == asset,
            upstream.c.day == ledger.c.day,
            upstream.c.materialized > ledger.c.requested,
        )
        .values(
            requested=upstream.c.materialized,
            requested_at=sa.func.clock_timestamp(),
            failures=0,
            retry_at=None,
            held_reason=None,
            failed_run_id=None,
        )
    )
