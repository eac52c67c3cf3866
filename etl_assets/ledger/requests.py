"""台账：每个资产的每一天被要求到哪个版本、做到了哪个版本。requested > materialized 就是到期。

同一天的全部资产共用一条数轴：没有上游的由导入抬高，别的 requested 就是它的上游都做到了的版本，
所以一个资产做到了某个版本，就说明那个版本的导入已走完到它为止的全程。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.etl_tables import assets, ledger
from etl_assets.ledger.graph import IN_GRAPH, catch_up_on, no_graph

_DAYS_PER_SECOND = 30.0


def ensure_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """让这些天的每个资产都有一行。"""
    execute_compiled(connection, _ENSURE_DAYS, {"of_target": target, "days": sorted(set(days))})


def request_days(
    connection: sa.Connection,
    target: str,
    days: Iterable[date],
    *,
    asset: str | None = None,
    changed_only: bool = False,
    deletes_allowed_on: Iterable[date] = (),
) -> Mapping[date, int]:
    """要求重做这些天，先前的失败与搁置一笔勾销；返回每一天要求到的版本。

    :param asset: 从它起；缺省是从没有上游的那些起，就像有了新的导入。它的上游这时还到期的不抬它，它们做完时自然到期。
    :param changed_only: `import_requests` 或标记说得出变了什么，不必整天重做。
    :param deletes_allowed_on: 其中有人明确允许大量删除的日子；它们总是整天重做。
    :raises DatabaseRefusedError: 还没有代码位置写下有哪些资产。
    """
    wanted = sorted(set(days))
    if not wanted:
        return {}
    _lock_days(connection, target, wanted)
    rows = connection.execute(
        _renumbering("import" if asset is None else "asset"),
        {
            "of_target": target,
            "of_asset": asset,
            "days": wanted,
            "changed_only": changed_only,
            "deletes_allowed_on": list(deletes_allowed_on),
        },
    )
    return {row.day: row.requested for row in rows if row.is_raised}


def request_downstream(connection: sa.Connection, target: str, asset: str, days: Iterable[date]) -> None:
    """别处的 ETL 做完了 asset 的这些天：让它后面的资产到期。

    上游自己还到期的日子不必动：它做完时下游自然到期。

    :raises DatabaseRefusedError: 还没有代码位置写下有哪些资产。
    """
    wanted = sorted(set(days))
    if not wanted:
        return
    _lock_days(connection, target, wanted)
    # 先推进做完的：它没有到期，不多出一个版本，后面的就没有更高的可到
    advance(connection, target, asset, wanted)
    connection.execute(_PASS_ON, {"of_target": target, "of_asset": asset, "days": wanted})


def advance(connection: sa.Connection, target: str, asset: str, days: Sequence[date]) -> None:
    """asset 又做了一遍没有到期的日子：推进一个版本。后面的以外，没有到期的都一起动，数轴才保持一致。行由调用者先锁住。"""
    connection.execute(_renumbering("made"), {"of_target": target, "of_asset": asset, "days": list(days)})


def _lock_days(connection: sa.Connection, target: str, days: Sequence[date]) -> None:
    """补上没有的行，按固定次序锁住。"""
    ensure_days(connection, target, days)
    if not connection.execute(_LOCK_DAYS, {"of_target": target, "days": days}).all():
        raise no_graph(target)
    catch_up_on(connection, target, days)


def days_allowing_deletes(target: str, asset: str, days: DayRange) -> sa.Select[Any]:
    """有人明确允许大量删除的日子。"""
    return sa.select(ledger.c.day).where(
        ledger.c.target == target, ledger.c.asset == asset, days.includes(ledger.c.day), ledger.c.allow_deletes
    )


# ---- 语句：建一次就留着，拼它们比执行它们还久 ---------------------------------------

_TARGET, _ASSET = (sa.bindparam(name, type_=sa.Text) for name in ("of_target", "of_asset"))
_DAYS = array("days", sa.Date)
_DAY = unnest("wanted", day=_DAYS)
_ENSURE_DAYS = (
    pg.insert(ledger)
    .from_select(
        ["target", "asset", "day"],
        sa.select(_TARGET, assets.c.asset, _DAY.c.day)
        .join_from(_DAY, assets, assets.c.target == _TARGET)
        # 按次序补：两批事件补同样的日子，次序不同就互相等着
        .order_by(_DAY.c.day, assets.c.asset),
    )
    .on_conflict_do_nothing()
)
_LOCK_DAYS = (
    sa.select(ledger.c.day)
    .join(assets, IN_GRAPH)
    .where(ledger.c.target == _TARGET, ledger.c.day == sa.any_(_DAYS))
    .order_by(ledger.c.day, ledger.c.asset)
    # 写明 of：不写连 assets 的行也锁，全部要求就都排在那几行后面，直到各自提交
    .with_for_update(of=ledger)
)
_ROW: sa.ColumnElement[Any] = sa.literal_column(f"{ledger.fullname}.ctid")
NOTHING_HELD: Mapping[str, Any] = {"failures": 0, "retry_at": None, "held_reason": None, "failed_run_id": None}
"""先前的失败与搁置一笔勾销。"""


def overlap(left: sa.ColumnElement[Any], right: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """SQL：两个数组有没有共同的；NULL 是空的。"""
    return sa.func.coalesce(left.op("&&")(right), sa.false(), type_=sa.Boolean())


@lru_cache(maxsize=3)
def _renumbering(kind: Literal["import", "asset", "made"]) -> sa.Update:
    """这些天的行各到哪个版本：import 抬高没有上游的，asset 抬高一个，made 是它又做了一遍。行已经锁住。

    新的版本比这一天有过的都高。抬高的、做过的以外，不在它们后面的也跟着到新的版本：
    不跟着，几个上游的资产看它们都做到了哪里时，就看不见这一步。到期的跟着的还是到期。
    """
    due = ledger.c.requested > ledger.c.materialized
    standing = (
        sa.select(
            _ROW.label("ctid"),
            *ledger.c["target", "day", "asset"],
            assets.c.ancestors,
            (sa.func.max(ledger.c.requested).over(partition_by=ledger.c.day) + 1).label("next"),
            (sa.func.dense_rank().over(order_by=ledger.c.day) - 1).label("turn"),
            sa.func.array_agg(ledger.c.asset, type_=pg.ARRAY(sa.Text))
            .filter(due)
            .over(partition_by=ledger.c.day)
            .label("due"),
        )
        .join(assets, IN_GRAPH)
        .where(ledger.c.target == _TARGET, ledger.c.day == sa.any_(_DAYS))
        .subquery("standing")
    )
    row = standing.c
    follows = sa.any_(row.ancestors) == _ASSET
    of_asset = (
        sa.select(assets.c.ancestors).where(assets.c.target == _TARGET, assets.c.asset == _ASSET).scalar_subquery()
    )
    is_raised, is_below, is_blocked = {
        "import": (sa.func.cardinality(row.ancestors) == 0, sa.true(), sa.false()),
        "asset": (row.asset == _ASSET, sa.or_(row.asset == _ASSET, follows), overlap(of_asset, row.due)),
        "made": (sa.false(), follows, overlap(sa.func.array_append(of_asset, _ASSET), row.due)),
    }[kind]
    goes_along = sa.and_(~is_below, ~is_blocked, ~overlap(row.ancestors, row.due))
    rises = sa.and_(is_raised, ~is_blocked)
    unbroken = ledger.c.changed_until == ledger.c.requested
    values: dict[str, Any] = {
        "requested": sa.case((sa.or_(rises, goes_along), row.next), else_=ledger.c.requested),
        "materialized": sa.case((sa.and_(goes_along, ~due), row.next), else_=ledger.c.materialized),
        # 跟着走的没有多出要做的：本来说得出变了什么的，还说得出，不因别人重做而变成整天
        "changed_until": sa.case((sa.and_(goes_along, due, unbroken), row.next), else_=ledger.c.changed_until),
    }
    if kind == "made":
        return _of_rows(standing).where(goes_along).values(values)
    deletes_allowed = ledger.c.day == sa.any_(array("deletes_allowed_on", sa.Date))
    changed_only = sa.and_(sa.bindparam("changed_only", type_=sa.Boolean), ~deletes_allowed)
    return (
        _of_rows(standing)
        .where(sa.or_(is_raised, goes_along, sa.and_(is_below, _is_held_up())))
        .values(
            values
            # 上游还到期的不抬它：变了什么，它们做完时轮到它就看得见
            | changed_until(row.next, sa.and_(rises, changed_only), is_whole=sa.and_(is_raised, ~changed_only))
            | {"requested_at": sa.case((rises, _moment_of(row.turn)), else_=ledger.c.requested_at)}
            | {"allow_deletes": sa.or_(ledger.c.allow_deletes, sa.and_(is_raised, deletes_allowed))}
            | {name: sa.case((is_below, value), else_=ledger.c[name]) for name, value in NOTHING_HELD.items()}
        )
        .returning(ledger.c.day, ledger.c.requested, rises.label("is_raised"))
    )


def _of_rows(rows: sa.Subquery) -> sa.Update:
    """按它们在表里的位置去改：锁住了的行不会挪，而几千天的日子与资产，规划器没有统计时一行一行地扫。"""
    return sa.update(ledger).where(rows.c.ctid == _ROW, rows.c.target == ledger.c.target)


def _is_held_up() -> sa.ColumnElement[bool]:
    return sa.or_(
        ledger.c.failures > 0, *[ledger.c[name].is_not(None) for name in ("retry_at", "held_reason", "failed_run_id")]
    )


def changed_until(
    revision: sa.ColumnElement[int], changed_only: sa.ColumnElement[bool], *, is_whole: sa.ColumnElement[bool]
) -> dict[str, sa.ColumnElement[int]]:
    """requested 抬到 revision 时记下：(changed_since, changed_until] 里的要求都说得出变了什么；中间断过的从现在算起。

    说不出的（也包括旧版本的进程抬的）不动 changed_until，它落在 requested 后面；要整天做的把 changed_since 抬到还没做的。
    """
    unbroken = ledger.c.changed_until == ledger.c.requested
    since = sa.func.greatest(ledger.c.changed_since, ledger.c.requested)
    return {
        "changed_since": sa.case(
            (is_whole, sa.func.greatest(ledger.c.changed_since, ledger.c.requested + 1)),
            (sa.and_(changed_only, ~unbroken), since),
            else_=ledger.c.changed_since,
        ),
        "changed_until": sa.case((changed_only, revision), else_=ledger.c.changed_until),
    }


def _moment_of(turn: sa.ColumnElement[int]) -> sa.ColumnElement[Any]:
    """轮到的时刻：领的时候等得最久的先，所以一次要求了几千天的，每三十天往后排一秒。

    此后来的一天不必等它全部做完，它也不会一直被插队。
    """
    return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, turn / _DAYS_PER_SECOND)


def passing_on(made: sa.FromClause, rows: sa.FromClause, *, is_whole: sa.ColumnElement[bool]) -> sa.Update:
    """语句：asset 做到了这里，后面的到期；它们的 requested 是上游都做到了的。有新要求的，搁置与失败一笔勾销。

    整天做的，后面的下一次也整天做：别的上游还没到的那些，轮到时只交代得出那时变了什么。

    :param made: asset 这些天做到的版本与时刻：day、materialized、materialized_at。后面的从那一刻起被要求，认得出是哪个运行交下去的。
    :param rows: 这些天此刻的行，刚锁住时读的：day、asset、materialized；asset 自己的以 made 为准。
    """
    reached = sa.case((rows.c.asset == _ASSET, made.c.materialized), else_=rows.c.materialized)
    common = (
        sa.select(
            *(assets.c.asset, made.c.day, made.c.materialized_at),
            sa.func.min(reached).label("revision"),
            sa.func.min(rows.c.materialized).label("before"),
        )
        .select_from(assets)
        .join(made, sa.true())
        .join(rows, sa.and_(rows.c.day == made.c.day, rows.c.asset == sa.any_(assets.c.upstreams)))
        .where(assets.c.target == _TARGET, sa.any_(assets.c.upstreams) == _ASSET)
        .group_by(assets.c.asset, made.c.day, made.c.materialized_at)
        .subquery("common")
    )
    rises = common.c.revision > ledger.c.requested
    # 上游早先做到的没有交给它，是 0.1.0 的工人做的：那时变了什么，没有标记
    is_whole = sa.or_(is_whole, common.c.before > ledger.c.requested)
    return (
        sa.update(ledger)
        .where(
            ledger.c.target == _TARGET,
            ledger.c.asset == common.c.asset,
            ledger.c.day == common.c.day,
            sa.or_(rises, is_whole),
        )
        .values(
            {"requested": sa.func.greatest(ledger.c.requested, common.c.revision)}
            | changed_until(common.c.revision, sa.and_(rises, ~is_whole), is_whole=is_whole)
            | {"requested_at": sa.case((rises, common.c.materialized_at), else_=ledger.c.requested_at)}
            | {name: sa.case((rises, value), else_=ledger.c[name]) for name, value in NOTHING_HELD.items()}
        )
    )


def _pass_on() -> sa.Update:
    """别处做的没有留标记，后面的整天做。"""
    now = sa.and_(ledger.c.target == _TARGET, ledger.c.day == sa.any_(_DAYS))
    rows = sa.select(ledger.c.day, ledger.c.asset, ledger.c.materialized).where(now).subquery("rows")
    moment = sa.func.clock_timestamp().label("materialized_at")
    made = sa.select(ledger.c.day, ledger.c.materialized, moment).where(now, ledger.c.asset == _ASSET).subquery("made")
    return passing_on(made, rows, is_whole=sa.true())


_PASS_ON = _pass_on()
