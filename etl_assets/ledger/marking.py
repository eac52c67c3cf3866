"""记下做到了哪里：读数据之前读台账，写数据的事务里记台账、交给后面的资产。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any, Literal, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import assets, import_requests, ledger
from etl_assets.core.tables import import_tasks
from etl_assets.ledger.graph import catch_up_on
from etl_assets.ledger.requests import NOTHING_HELD, advance, ensure_days, passing_on

Scope = Literal["changed", "whole"]
"""一次物化做了什么：等着的导入点名的，还是整天。"""


@dataclass(frozen=True)
class Revisions:
    """运行读数据之前读到的台账：到期的日子 → 要求的版本；没有到期、有人重跑的日子，其中 unknown 在台账里还没有行。

    whole 是为什么不能只做变了的：有一天的要求说不出变了什么，或者自从整天做过以来指纹变了；None 是可以。
    made_by 是每一天上次由哪个运行做的；waiting 是还等着这个资产的这些天的导入，只有没有上游的资产才看，都完成了。
    downstreams 是紧跟在后面的资产。
    """

    due: Mapping[date, int]
    reruns: Sequence[date]
    unknown: Sequence[date] = ()
    fingerprint: str = ""
    whole: str | None = None
    made_by: Mapping[date, str] = field(default_factory=dict)
    waiting: Sequence[str] = ()
    downstreams: frozenset[str] = frozenset()


class Fingerprint(NamedTuple):
    """SQL 与它的参数：一天的结果除了它的行还取决于什么，此刻的指纹。变了，这一天就要整天重做。"""

    sql: sa.ScalarSelect[str]
    parameters: dict[str, object]


class _LedgerRow(NamedTuple):
    """`_read_revisions` 的一行；没有行的日子只有头三列。"""

    current: str
    is_root: bool | None
    downstreams: Sequence[str]
    day: date
    requested: int
    materialized: int
    changed_since: int
    changed_until: int
    fingerprint: str | None
    run_id: str
    waiting: Sequence[str] | None
    newest_waiting: int | None
    withdrawn: bool | None


def read_revisions(connection: sa.Connection, target: str, asset: str, days: DayRange, now: Fingerprint) -> Revisions:
    """在读数据之前读：此后提交的要求不算在这次运行头上。

    没有行的日子这时不补：没提交的新行会让别的要求一直等到这个运行结束。
    """
    return parse_revisions(days, connection.execute(*revisions_query(target, asset, days, now)).tuples().all())


def revisions_query(
    target: str, asset: str, days: DayRange, now: Fingerprint
) -> tuple[sa.Select[Any], dict[str, object]]:
    """`read_revisions` 的语句与参数，给要与别的一起发的；它的行交给 `parse_revisions`。"""
    parameters = {"of_target": target, "of_asset": asset, "first": days.first, "last": days.last}
    return _read_revisions(now.sql), parameters | now.parameters


def parse_revisions(days: DayRange, found: Sequence[tuple[Any, ...]]) -> Revisions:
    rows = [_LedgerRow(*row) for row in found]
    own = [row for row in rows if row.day is not None]
    due = {row.day: row.requested for row in own if row.requested > row.materialized}
    known = {row.day for row in own}
    current = rows[0].current
    return Revisions(
        due,
        reruns=[day for day in days if day not in due],
        unknown=[day for day in days if day not in known],
        fingerprint=current,
        whole=next((reason for row in rows if (reason := _why_whole(row, current))), None),
        made_by={row.day: row.run_id for row in own},
        waiting=sorted({import_id for row in own for import_id in row.waiting or ()}),
        downstreams=frozenset(rows[0].downstreams),
    )


def _why_whole(row: _LedgerRow, fingerprint: str) -> str | None:
    if row.fingerprint is None:
        return "not yet done as a whole"
    if row.fingerprint != fingerprint:
        return "shops, mappings, settings or tables changed"
    if row.requested == row.materialized:
        return None
    # 旧版本的进程只抬 requested：changed_until 因此落在后面，凭这个看出有说不清的要求
    if row.changed_since > row.materialized or row.changed_until != row.requested:
        return "asked for as a whole"
    if row.is_root and row.newest_waiting != row.requested:
        return "the waiting imports do not say what changed"
    return "a waiting import was withdrawn" if row.withdrawn else None


def prepare_marking(
    connection: sa.Connection,
    target: str,
    asset: str,
    days: DayRange,
    revisions: Revisions,
    *,
    run_id: str,
    scope: Scope,
) -> dict[str, object]:
    """`marking` 的参数，在写数据的事务里。

    没有到期的日子（有人重跑）先各加一个新版本，好让下游也到期；若上游这时又到期了就不加，它做完时下游自然到期。
    """
    parameters = {"of_target": target, "of_asset": asset, "first": days.first, "last": days.last}
    # 到这时才补：没提交的新行只扣着别的要求提交前的这一小会儿，而不是整个运行
    if revisions.unknown:
        ensure_days(connection, target, revisions.unknown)
    if revisions.reruns:
        connection.execute(_LOCK_DAYS, parameters).all()
        catch_up_on(connection, target, list(days))
        advance(connection, target, asset, revisions.reruns)
    seen = {"seen_days": list(revisions.due), "seen_revisions": list(revisions.due.values())}
    return parameters | seen | {"by_run": run_id, "in_scope": scope, "seen_fingerprint": revisions.fingerprint}


def waiting_imports(connection: sa.Connection, target: str, asset: str, days: DayRange) -> list[UUID]:
    """还在等这个资产的这些天的导入。"""
    own = sa.and_(ledger.c.target == target, ledger.c.asset == asset, ledger.c.day == import_requests.c.day)
    waiting = (
        sa.select(import_requests.c.import_id.distinct())
        .join(ledger, own)
        .where(import_requests.c.target == target, days.includes(import_requests.c.day))
        .where(import_requests.c.revision > ledger.c.materialized)
        .order_by(import_requests.c.import_id)
    )
    return list(connection.scalars(waiting))


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_TARGET, _ASSET = (sa.bindparam(name, type_=sa.Text) for name in ("of_target", "of_asset"))
_OF_DAYS = sa.and_(
    ledger.c.target == _TARGET,
    ledger.c.day.between(sa.bindparam("first", type_=sa.Date), sa.bindparam("last", type_=sa.Date)),
)
_OWN = ledger.c.asset == _ASSET
# 一天的行全锁，不只是自己的：下游到哪里要看它所有的上游，别的上游可能正要记下
_LOCK_DAYS = (
    sa.select(ledger.c.day, ledger.c.asset, ledger.c.materialized)
    .where(_OF_DAYS)
    .order_by(ledger.c.day, ledger.c.asset)
    .with_for_update()
)


@lru_cache(maxsize=8)
def _read_revisions(fingerprint: sa.ScalarSelect[str]) -> sa.Select[Any]:
    """一行一天；至少一行，所以总有指纹。"""
    names = ("day", "requested", "materialized", "changed_since", "changed_until", "fingerprint", "run_id")
    own = sa.select(sa.func.cardinality(assets.c.upstreams) == 0).where(
        assets.c.target == _TARGET, assets.c.asset == _ASSET
    )
    following = sa.select(assets.c.asset).where(assets.c.target == _TARGET, sa.any_(assets.c.upstreams) == _ASSET)
    current = sa.select(
        fingerprint.label("current"),
        own.scalar_subquery().label("is_root"),
        sa.func.array(following.scalar_subquery(), type_=pg.ARRAY(sa.Text)).label("downstreams"),
    ).subquery("now")
    waiting = (
        sa.select(
            sa.func.array_agg(sa.cast(import_requests.c.import_id, sa.Text)).label("waiting"),
            sa.func.max(import_requests.c.revision).label("newest_waiting"),
            sa.func.bool_or(import_tasks.c.status.is_distinct_from("completed")).label("withdrawn"),
        )
        .outerjoin(import_tasks, import_tasks.c.import_id == import_requests.c.import_id)
        .where(import_requests.c.target == ledger.c.target, import_requests.c.day == ledger.c.day)
        .where(import_requests.c.revision > ledger.c.materialized, current.c.is_root)
        .lateral("waiting")
    )
    return (
        sa.select(*current.c, *ledger.c[names], *waiting.c)
        .select_from(current)
        .outerjoin(ledger, sa.and_(_OF_DAYS, _OWN))
        .outerjoin(waiting, sa.true())
    )


@lru_cache(maxsize=1)
def marking() -> sa.Select[tuple[UUID]]:
    """一条语句：按固定次序锁住这些天，记下做到的版本，交给下游，返回因此完成的导入（按做之前的版本算）。

    整天做的，下游也整天做；只做变了的，给下游留了标记。
    """
    locked = _LOCK_DAYS.cte("locked")
    all_locked = sa.select(sa.func.count()).select_from(locked).scalar_subquery() > 0  # 先全锁住，再改
    seen = unnest("seen", day=array("seen_days", sa.Date), revision=array("seen_revisions", sa.BigInteger))
    finished = (
        sa.select(import_requests.c.import_id.distinct().label("import_id"))
        .join(ledger, sa.and_(_OF_DAYS, _OWN, ledger.c.day == import_requests.c.day))
        .join(seen, seen.c.day == ledger.c.day)
        .where(
            import_requests.c.target == ledger.c.target,
            import_requests.c.revision > ledger.c.materialized,
            import_requests.c.revision <= seen.c.revision,
        )
        .order_by(import_requests.c.import_id)
    )
    scope = sa.bindparam("in_scope", type_=sa.Text)
    revision = sa.select(seen.c.revision).where(seen.c.day == ledger.c.day).scalar_subquery()
    # 别的运行可能先记下了更新的版本，不往回拨；有人重跑的日子不在 seen 里，greatest 略过 NULL，留着 advance 给的
    materialized = sa.func.greatest(ledger.c.materialized, revision)
    marked = (
        sa.update(ledger)
        .where(_OF_DAYS, _OWN, all_locked)
        .values(
            materialized=materialized,
            materialized_at=sa.func.clock_timestamp(),
            run_id=sa.bindparam("by_run", type_=sa.Text),
            # 许可只用一回；运行期间又有要求来的，也许正是那一个带来的，留着
            allow_deletes=sa.and_(ledger.c.allow_deletes, ledger.c.requested > materialized),
            scope=scope,
            fingerprint=sa.case(
                (scope == "whole", sa.bindparam("seen_fingerprint", type_=sa.Text)), else_=ledger.c.fingerprint
            ),
            **NOTHING_HELD,
        )
        .returning(ledger.c.day, ledger.c.materialized, ledger.c.materialized_at)
        .cte("marked")
    )
    # 别的上游做到了哪里，看刚锁住的行：等锁的工夫别人提交的，这条语句的快照里没有
    return finished.add_cte(marked, passing_on(marked, locked, is_whole=scope == "whole").cte("passed_on"))
