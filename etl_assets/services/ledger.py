"""台账：每个资产的每一天被要求到哪个版本、做到了哪个版本。requested > materialized 就是到期。

同一天的三个资产共用一条数轴：订单的 requested 由导入抬高，下游的 requested 就是上游的 materialized，
所以 leads 做到了某个版本，就说明那个版本的导入已走完全程。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.tables import import_events, import_requests, ledger
from etl_assets.core.text import storable

ASSETS = ("orders", "customers", "leads")
"""资产链，上游在前；要在中间插入一个资产，就插进这里。"""

MAX_FAILURES = 5
_FIRST_RETRY_SECONDS = 5
_LONGEST_RETRY_SECONDS = 60

Failure = Literal["transient", "permanent", "unknown"]
"""失败的种类，决定何时再试。"""


@dataclass(frozen=True)
class Revisions:
    """运行读数据之前读到的台账：到期的日子 → 要求的版本；没有到期、有人重跑的日子。"""

    due: Mapping[date, int]
    reruns: Sequence[date]


def up_to(asset: str) -> list[str]:
    """资产链上到 asset 为止的资产，含它自己。"""
    return list(ASSETS[: ASSETS.index(asset) + 1])


def after(asset: str) -> list[str]:
    """紧跟在 asset 后面的资产；末尾的没有。"""
    return list(ASSETS[ASSETS.index(asset) + 1 :][:1])


def before(asset: str) -> str | None:
    """紧排在 asset 前面的资产；链头没有。"""
    position = ASSETS.index(asset)
    return ASSETS[position - 1] if position else None


def ensure_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """让这些天的每个资产都有一行。"""
    execute_compiled(connection, _ENSURE_DAYS, {"of_target": target, "days": sorted(set(days))})


def request_days(connection: sa.Connection, target: str, days: Iterable[date], *, deletes_allowed_on: Iterable[date] = ()) -> None:
    """要求从订单起重做这些天：订单的 requested 加一，先前的失败与搁置一笔勾销。

    :param deletes_allowed_on: 其中有人明确允许大量删除的日子。
    """
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
            requested_at=_turn(wanted),
            allow_deletes=sa.or_(ledger.c.allow_deletes, ledger.c.day == sa.any_(sa.cast(list(deletes_allowed_on), sa.ARRAY(sa.Date)))),
        )
    )
    connection.execute(sa.update(ledger).where(condition).values(failures=0, retry_at=None, held_reason=None, failed_run_id=None))


def _turn(wanted: Sequence[date]) -> sa.ColumnElement[Any]:
    """每一天轮到的时刻：领的时候等得最久的先，所以一次要求了几千天的，每三十天往后排一秒。

    此后来的一天不必等它全部做完，它也不会一直被插队。
    """
    later = sa.func.array_position(sa.cast(wanted, sa.ARRAY(sa.Date)), ledger.c.day, type_=sa.Integer()) - 1
    return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, later / 30.0)


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
    _advance(connection, target, asset, wanted)
    _pass_on(connection, target, asset, in_days)


def read_revisions(connection: sa.Connection, target: str, asset: str, days: DayRange) -> Revisions:
    """在读数据之前读：此后提交的要求不算在这次运行头上。"""
    parameters = {"of_target": target, "of_asset": asset, "first": days.first, "last": days.last}
    rows = connection.execute(_READ_REVISIONS, parameters).all()
    if len(rows) < len(days):
        ensure_days(connection, target, days)
        rows = connection.execute(_READ_REVISIONS, parameters).all()
    return Revisions(
        due={row.day: row.requested for row in rows if row.requested > row.materialized},
        reruns=[row.day for row in rows if row.requested <= row.materialized],
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
    parameters = {"of_target": target, "of_asset": asset, "first": days.first, "last": days.last}
    connection.execute(_LOCK_DAYS, parameters).all()
    if revisions.reruns:
        _advance(connection, target, asset, revisions.reruns)
    seen = {"seen_days": list(revisions.due), "seen_revisions": list(revisions.due.values())}
    return list(connection.scalars(_mark_materialized(tuple(after(asset))), parameters | seen | {"by_run": run_id}))


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


def waiting_events(
    connection: sa.Connection, target: str, asset: str, days: DayRange, *, limit: int
) -> Sequence[sa.Row[tuple[UUID, UUID, int]]]:
    """还在等这个资产的这些天的导入与要求它们的事件，最新的在前：import_id、event_id、stream_sequence。"""
    parameters = {"of_target": target, "of_asset": asset, "first": days.first, "last": days.last, "at_most": limit}
    return connection.execute(_WAITING_EVENTS, parameters).all()


def record_failure(
    connection: sa.Connection,
    target: str,
    assets: Iterable[str],
    days: DayRange,
    *,
    reason: str,
    kind: Failure,
    run_id: str | None = None,
    first_retry_seconds: float = _FIRST_RETRY_SECONDS,
) -> list[str]:
    """运行失败：还到期的日子稍后再试，或者搁置，直到有新的要求；返回有这样的日子的资产，上游在前。

    :param kind: transient 的原因在外面，等得越久试得越疏，不计次数；permanent 重试无用，立刻搁置；unknown 间隔翻倍，次数用尽搁置。
    """
    overdue = _overdue(target, assets, days)
    _lock(connection, overdue)
    waited = sa.func.extract("epoch", sa.func.clock_timestamp() - ledger.c.requested_at)
    backoff_seconds = {
        "transient": sa.func.least(sa.func.greatest(waited / 2, first_retry_seconds), _LONGEST_RETRY_SECONDS),
        "permanent": sa.literal(0),
        "unknown": first_retry_seconds * sa.func.power(2, ledger.c.failures),
    }[kind]
    failures = ledger.c.failures + (0 if kind == "transient" else 1)
    held = sa.or_(sa.literal(kind == "permanent"), failures >= MAX_FAILURES)
    retry_at = sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, backoff_seconds)
    recorded = connection.scalars(
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
    return sorted(set(recorded), key=ASSETS.index)


def unfinished_assets(connection: sa.Connection, target: str, run_id: str, assets: Iterable[str], days: DayRange) -> list[str]:
    """这个运行还没有做完每一天的资产，次序照旧：做完的已经提交了，不管运行后来怎样结束。"""
    own = sa.and_(ledger.c.target == target, days.includes(ledger.c.day), ledger.c.run_id == run_id)
    counts = sa.select(ledger.c.asset, sa.func.count()).where(own).group_by(ledger.c.asset)
    made = dict(connection.execute(counts).tuples().all())
    return [asset for asset in assets if made.get(asset, 0) < len(days)]


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


def _advance(connection: sa.Connection, target: str, asset: str, days: Sequence[date]) -> None:
    """把链上到 asset 为止都没有到期的日子推进一个版本，整条链一起动，数轴才保持一致。"""
    connection.execute(_advanced(tuple(up_to(asset))), {"of_target": target, "days": list(days)})


def _pass_on(connection: sa.Connection, target: str, asset: str, condition: sa.ColumnElement[bool]) -> None:
    """下游的 requested 就是上游的 materialized；有新要求时搁置与失败一笔勾销。"""
    upstream = ledger.alias("upstream")
    of_asset = sa.and_(upstream.c.target == target, upstream.c.asset == asset)
    connection.execute(_passed_on(after(asset), upstream).where(of_asset, condition))


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_OF_DAYS = sa.and_(
    ledger.c.target == sa.bindparam("of_target", type_=sa.Text),
    ledger.c.day.between(sa.bindparam("first", type_=sa.Date), sa.bindparam("last", type_=sa.Date)),
)
_DAY = sa.func.unnest(sa.bindparam("days", type_=sa.ARRAY(sa.Date))).table_valued("day", name="wanted").render_derived()
_ASSET = sa.func.unnest(sa.cast(sorted(ASSETS), sa.ARRAY(sa.Text))).table_valued("asset", name="assets").render_derived()
_ENSURE_DAYS = (
    pg.insert(ledger)
    .from_select(
        ["target", "asset", "day"],
        sa.select(sa.bindparam("of_target", type_=sa.Text), _ASSET.c.asset, _DAY.c.day)
        .join_from(_DAY, _ASSET, sa.true())
        .order_by(_DAY.c.day, _ASSET.c.asset),
    )
    .on_conflict_do_nothing()
)
_OWN = ledger.c.asset == sa.bindparam("of_asset", type_=sa.Text)
_READ_REVISIONS = sa.select(ledger.c.day, ledger.c.requested, ledger.c.materialized).where(_OF_DAYS, _OWN)
_LOCK_DAYS = sa.select(ledger.c.day).where(_OF_DAYS).order_by(ledger.c.day, ledger.c.asset).with_for_update()


_WAITING_EVENTS = (
    sa.select(import_events.c.import_id, import_events.c.event_id, import_events.c.stream_sequence)
    .select_from(import_requests)
    .join(ledger, sa.and_(_OF_DAYS, _OWN, ledger.c.day == import_requests.c.day, ledger.c.target == import_requests.c.target))
    .join(import_events, sa.and_(import_events.c.import_id == import_requests.c.import_id, import_events.c.target == ledger.c.target))
    .where(import_requests.c.revision > ledger.c.materialized)
    .group_by(import_events.c.import_id, import_events.c.event_id, import_events.c.stream_sequence)
    .order_by(sa.func.max(import_requests.c.revision).desc(), import_events.c.import_id)
    .limit(sa.bindparam("at_most", type_=sa.Integer))
)


@lru_cache(maxsize=8)
def _advanced(chain_to_asset: tuple[str, ...]) -> sa.Update:
    chain = ledger.alias("chain")
    of_chain = sa.cast(chain_to_asset, sa.ARRAY(sa.Text))
    behind = (
        sa.select(chain.c.day)
        .where(
            chain.c.target == ledger.c.target,
            chain.c.day == ledger.c.day,
            chain.c.asset == sa.any_(of_chain),
            chain.c.requested > chain.c.materialized,
        )
        .exists()
    )
    wanted = ledger.c.day == sa.any_(sa.bindparam("days", type_=sa.ARRAY(sa.Date)))
    return (
        sa.update(ledger)
        .where(ledger.c.target == sa.bindparam("of_target", type_=sa.Text), ledger.c.asset == sa.any_(of_chain), wanted, ~behind)
        .values(requested=ledger.c.requested + 1, materialized=ledger.c.requested + 1)
    )


@lru_cache(maxsize=8)
def _mark_materialized(downstream: tuple[str, ...]) -> sa.Select[tuple[UUID]]:
    """一条语句：记下做到的版本，交给下游，返回因此完成的导入（按做之前的版本算）。"""
    seen = (
        sa.func.unnest(sa.bindparam("seen_days", type_=sa.ARRAY(sa.Date)), sa.bindparam("seen_revisions", type_=sa.ARRAY(sa.BigInteger)))
        .table_valued(sa.column("day", sa.Date), sa.column("revision", sa.BigInteger), name="seen")
        .render_derived()
    )
    finished = (
        sa.select(import_requests.c.import_id.distinct())
        .join(ledger, sa.and_(_OF_DAYS, _OWN, ledger.c.day == import_requests.c.day))
        .join(seen, seen.c.day == ledger.c.day)
        .where(
            import_requests.c.target == ledger.c.target,
            import_requests.c.revision > ledger.c.materialized,
            import_requests.c.revision <= seen.c.revision,
        )
        .order_by(import_requests.c.import_id)
    )
    revision = sa.select(seen.c.revision).where(seen.c.day == ledger.c.day).scalar_subquery()
    materialized = sa.func.greatest(ledger.c.materialized, revision)
    marked = (
        sa.update(ledger)
        .where(_OF_DAYS, _OWN)
        .values(
            materialized=materialized,
            materialized_at=sa.func.clock_timestamp(),
            run_id=sa.bindparam("by_run", type_=sa.Text),
            failures=0,
            retry_at=None,
            held_reason=None,
            failed_run_id=None,
            allow_deletes=sa.and_(ledger.c.allow_deletes, ledger.c.requested > materialized),
        )
        .returning(ledger.c.target, ledger.c.day, ledger.c.materialized)
        .cte("marked")
    )
    if not downstream:
        return finished.add_cte(marked)
    passed_on = _passed_on(list(downstream), marked).cte("passed_on")
    return finished.add_cte(marked, passed_on)


def _passed_on(downstream: list[str], upstream: sa.FromClause) -> sa.Update:
    return (
        sa.update(ledger)
        .where(
            ledger.c.target == upstream.c.target,
            ledger.c.asset.in_(downstream),
            ledger.c.day == upstream.c.day,
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
