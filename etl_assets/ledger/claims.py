"""领活：到期、没人做、也没在等的日子，连同一个运行该做的资产。"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import NamedTuple
from uuid import uuid4

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.business_day import DayRange, contiguous_ranges
from etl_assets.core.database_sync import execute_together
from etl_assets.core.etl_tables import TARGET
from etl_assets.ledger.leases import Lease
from etl_assets.ledger.locks import lock_parameters, lock_statements

# 一天一个运行，每个都付一遍固定的开销；全在一个运行里，锁与内存占得久，一失败全失败，也分不到几个工人
MAX_DAYS_PER_RUN = 30
NAMED_EVENTS = 10
"""一个运行的标签里至多点这么多个导入的名。"""

# 平常的来法（零星的事件，同一天每秒一个）在一个运行的工夫里积不到这么多，所以从不等
RUSH_IMPORTS = 16
"""上次做完以来，等着同一天的导入不止这么多个，就是一阵急雨。"""
RUSH_ROWS = 10_000
"""等着的导入已有这么多行，够一个运行做的，就不再等。"""
_MOST_LOOKED_AT = 1_000
SMALL_ROWS = 1_000
"""等着的导入没有成急雨、一共不到这么多行，或者等着的只是不到这么多个客户，就是小的日子：不到一秒就做完。"""
RUSH_QUIET_SECONDS = 1.0
RUSH_PATIENCE_SECONDS = 10.0
"""急雨里的日子静下来这么久再做；一直不静，离上次做完这么久也做。"""


class AskingEvent(NamedTuple):
    """还等着这些天的一个导入，与要求它的事件；source_name 是导入的人写的，多半是文件名。"""

    import_id: str
    event_id: str
    stream_sequence: int | None
    source_name: str | None = None


class HandedOn(NamedTuple):
    """刚做过、把这些天交下来的上游，与做它的运行。"""

    asset: str
    run_id: str


@dataclass(frozen=True)
class Claim:
    """领到的工作：这段日子的这些资产，上游在前；more 表示还有别的到期日子没人做。

    retry_of 是上次做这些日子而失败的运行；asked_by 是最新的几个要求它们的事件，handed_on 是交下它们的上游；waited_seconds 是等了最久的
    要求等了多久。
    """

    lease: Lease
    days: DayRange
    assets: tuple[str, ...]
    more: bool
    retry_of: str | None = None
    asked_by: Sequence[AskingEvent] = ()
    handed_on: HandedOn | None = None
    waited_seconds: float = 0.0


def claim_due_days(
    connection: sa.Connection,
    target: str,
    *,
    run_id: str,
    owner: str,
    lease_seconds: float,
    known: Collection[str] | None = None,
    small: bool = False,
) -> Claim | None:
    """领走等得最久的一段到期日子（连续、从同样的资产起、至多 30 天）；没有可领的是 None。锁住、找到、记下租约，一次往返。

    :param known: 领的人的代码里有的资产；别的、排在别的后面的，留给有它们的工人。缺省是全都有。
    :param small: 只领小的：说得出变了什么，等着的是几次小导入。
    """
    lease = Lease(run_id=run_id, token=uuid4())
    values = {"run_id": run_id, "token": lease.token, "owner": owner, "seconds": lease_seconds}
    of_whom = {"of_target": target, "known": None if known is None else sorted(known), "small": small}
    locks = lock_parameters(target, "claim", [0])
    # 锁与找分作两条语句：后一条另取快照，才看得见前一个领取者刚记下的租约；合成一条，两个工人会领走同样的日子
    *_, claimed = execute_together(connection, *lock_statements(), _CLAIM, parameters=values | of_whom | locks)
    (
        (
            first,
            last,
            available,
            failed_run_id,
            other_failed_run_id,
            waited_seconds,
            made,
            asked_by,
            handed_on,
            leased_run_id,
        ),
    ) = claimed
    if first is None:
        return None
    days = DayRange(first, last)
    if leased_run_id is None:
        raise ValueError(f"run {run_id} is not new")
    return Claim(
        lease=lease,
        days=days,
        assets=tuple(made),
        more=available > len(days),
        # 这一段上次败在几个不同的运行里，就谁也不接：Dagster 的运行只有一个父运行
        retry_of=failed_run_id if failed_run_id == other_failed_run_id else None,
        asked_by=[AskingEvent(*event) for event in asked_by or ()],
        handed_on=HandedOn(*handed_on) if handed_on else None,
        waited_seconds=waited_seconds,
    )


def has_claimable_days(connection: sa.Connection, target: str) -> bool:
    """有没有到期、没人做、也不在等重试的日子。"""
    return bool(connection.scalar(_HAS_CLAIMABLE, {"of_target": target, "known": None, "small": False}))


def has_days_in_a_rush(connection: sa.Connection, target: str) -> bool:
    """有没有到期、只因为还在一阵急雨里才不能领的日子。"""
    return bool(connection.scalar(_HAS_RUSHED, {"of_target": target}))


def quietest_day(connection: sa.Connection, target: str, asset: str, days: Collection[date]) -> date:
    """这些天里没有活挡着 asset 的最早的一天：它的上游不到期，也没有运行占着；都挡着就是最早的。"""
    parameters = {"of_target": target, "of_asset": asset, "days": sorted(days)}
    day: date = connection.execute(_QUIETEST_DAY, parameters).scalar_one()
    return day


def read_overdue_days(connection: sa.Connection, target: str, after: timedelta) -> list[tuple[DayRange, datetime]]:
    """到期了这么久还没人做的日子，连续的成一段（至多 30 天），连同等了最久的要求的时刻。"""
    parameters = {"of_target": target, "known": None, "small": False, "after": after}
    since = dict(connection.execute(_OVERDUE, parameters).tuples().all())
    parts = (part for days in contiguous_ranges(since) for part in days.in_bites(MAX_DAYS_PER_RUN))
    return [(days, min(since[day] for day in days)) for days in parts]


# ---- 语句；l 是台账的一行，a 是它的资产 ------------------------------------------------

_IS_DUE = """
    etl.ledger l JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
    WHERE l.target = :of_target AND l.requested > l.materialized"""
# 发布到一半，新旧工人并排：领的人连它的上游都要有，新资产的日子才留给新工人，不被旧的占住
_IS_KNOWN = "coalesce(array_append(a.ancestors, a.asset) <@ :known, true)"

# 等着这一行的导入，至多看这么多个
_WAITING = """
    SELECT t.row_count FROM etl.import_requests r LEFT JOIN public.import_tasks t ON t.import_id = r.import_id
    WHERE r.target = l.target AND r.day = l.day AND r.revision > l.materialized LIMIT {most}"""

# 刚做完，又积下了许多导入，还在来：等一等，几千个事件才不会一个运行接着一个运行。从没做过的日子、积得够多的不等
_IS_IN_A_RUSH = f"""
    CASE WHEN l.requested_at > clock_timestamp() - interval '{RUSH_QUIET_SECONDS} seconds'
          AND l.materialized_at > clock_timestamp() - interval '{RUSH_PATIENCE_SECONDS} seconds'
    THEN (
        SELECT count(*) > {RUSH_IMPORTS} AND coalesce(sum(row_count), 0) < {RUSH_ROWS}
        FROM ({_WAITING.format(most=_MOST_LOOKED_AT)}) AS waiting
    ) ELSE false END"""  # noqa: S608  # 只拼接常量

# 等着这一行的标记，至多数到 SMALL_ROWS 个
_MARKED_CUSTOMERS = f"""
    SELECT count(*) FROM (
        SELECT FROM etl.stale_customers m WHERE m.target = l.target AND m.asset = l.asset AND m.day = l.day LIMIT {SMALL_ROWS}
    ) AS marks"""  # noqa: S608  # 只拼接常量

# 不知道行数的导入算大的；整天重做的也是。没有导入等着的，看标记了几个客户
_IS_SMALL = f"""
    l.changed_until = l.requested AND (
        SELECT count(*) BETWEEN 1 AND {RUSH_IMPORTS} AND sum(coalesce(row_count, {SMALL_ROWS})) < {SMALL_ROWS}
               OR count(*) = 0 AND cardinality(a.ancestors) > 0 AND ({_MARKED_CUSTOMERS}) < {SMALL_ROWS}
        FROM ({_WAITING.format(most=RUSH_IMPORTS + 1)}) AS waiting
    )"""  # noqa: S608  # 只拼接常量

# 有运行占着这一天
_IS_LEASED = (
    "EXISTS (SELECT FROM etl.leases s WHERE s.target = :of_target AND {day} BETWEEN s.first_day AND s.last_day)"
)

# due_days 一行一个能领的日子：since 是等了最久的要求。
# 到期而前面没有到期的资产，能领的是 starts，在等的（搁置、等重试、急雨、领的人没有它）是 stuck
_DUE_DAYS = f"""
    WITH due_assets AS (
        SELECT l.day, l.asset, l.requested_at, l.failed_run_id, a.ancestors,
               array_agg(l.asset) OVER (PARTITION BY l.day) AS due,
               l.held_reason IS NULL AND (l.retry_at IS NULL OR l.retry_at <= clock_timestamp()) AND NOT ({_IS_IN_A_RUSH})
               AND {_IS_KNOWN} AND (NOT :small OR ({_IS_SMALL})) AS is_ready
        FROM {_IS_DUE} AND NOT {_IS_LEASED.format(day="l.day")}
    ), due_days AS (
        SELECT day,
               array_agg(asset ORDER BY asset) FILTER (WHERE is_ready) AS starts,
               array_agg(asset ORDER BY asset) FILTER (WHERE NOT is_ready) AS stuck,
               min(requested_at) FILTER (WHERE is_ready) AS since,
               min(failed_run_id) FILTER (WHERE is_ready) AS failed_run_id
        FROM due_assets WHERE NOT coalesce(ancestors && due, false)
        GROUP BY day HAVING bool_or(is_ready)
    )"""  # noqa: S608  # 只拼接常量


def _text(statement: str) -> sa.TextClause:
    known, small = array("known", sa.Text), sa.bindparam("small", type_=sa.Boolean)
    return sa.text(statement).bindparams(TARGET, known, small)


_HAS_CLAIMABLE = _text(f"{_DUE_DAYS} SELECT EXISTS (SELECT FROM due_days)")  # noqa: S608  # 只拼接常量
_HAS_RUSHED = sa.text(f"SELECT EXISTS (SELECT FROM {_IS_DUE} AND {_IS_IN_A_RUSH})").bindparams(TARGET)  # noqa: S608  # 只拼接常量
_OVERDUE = _text(
    f"{_DUE_DAYS} SELECT day, since FROM due_days WHERE since < clock_timestamp() - :after ORDER BY day"  # noqa: S608  # 只拼接常量
).bindparams(sa.bindparam("after", type_=sa.Interval))

_QUIETEST_DAY = sa.text(f"""
    SELECT w.day FROM unnest(:days) AS w (day)
    ORDER BY {_IS_LEASED.format(day="w.day")} OR EXISTS (
        SELECT FROM {_IS_DUE} AND l.day = w.day
        AND l.asset = ANY (SELECT unnest(ancestors) FROM etl.assets WHERE target = :of_target AND asset = :of_asset)
        OFFSET 0 -- 每天各走索引：没有它，规划器把整本台账读成一张散列表
    ), w.day
    LIMIT 1""").bindparams(TARGET, sa.bindparam("of_asset", type_=sa.Text), array("days", sa.Date))  # noqa: S608  # 只拼接常量

# 等得最久的一段：头、尾、从哪些资产起、哪些动不了、能领的日子共有几个、上次失败的运行（最小的与最大的）、等了多久；
# 它的资产（排在动不了的后面的不做：它们轮到时还要再做），还等着它们的导入中最新的几个，交下它们的上游，给它记下的租约的运行
_CLAIM = _text(f"""
    {_DUE_DAYS}, islands AS (
        -- 连续的日子减去行号得同一个值，于是每段连续、起点相同的日子成一组
        SELECT *, count(*) OVER () AS available,
               day - CAST(row_number() OVER (PARTITION BY starts, stuck ORDER BY day) AS integer) AS number
        FROM due_days
    ), oldest AS (
        SELECT * FROM islands ORDER BY since, day LIMIT 1
    ), island AS MATERIALIZED (
        SELECT min(i.day) AS first_day, max(i.day) AS last_day, max(o.starts) AS starts, max(o.stuck) AS stuck,
               max(o.available) AS available, max(o.since) AS since,
               min(i.failed_run_id) AS failed_run_id, max(i.failed_run_id) AS other_failed_run_id
        FROM islands i JOIN oldest o ON i.number = o.number AND i.starts = o.starts AND i.stuck IS NOT DISTINCT FROM o.stuck
        WHERE i.day BETWEEN o.day AND o.day + {MAX_DAYS_PER_RUN - 1}
    ), leased AS (
        INSERT INTO etl.leases (run_id, token, owner, target, first_day, last_day, expires_at)
        SELECT :run_id, :token, :owner, :of_target, first_day, last_day, clock_timestamp() + make_interval(secs => :seconds)
        FROM island WHERE first_day IS NOT NULL
        ON CONFLICT DO NOTHING RETURNING run_id
    ), newest AS (
        SELECT e.import_id, e.event_id, e.stream_sequence, t.source_name, max(r.revision) AS revision
        FROM island i
        JOIN etl.ledger l ON l.target = :of_target AND l.asset = ANY (i.starts) AND l.day BETWEEN i.first_day AND i.last_day
        JOIN etl.import_requests r ON r.target = :of_target AND r.day = l.day AND r.revision > l.materialized
        JOIN etl.import_events e ON e.target = :of_target AND e.import_id = r.import_id
        LEFT JOIN public.import_tasks t ON t.import_id = r.import_id
        GROUP BY e.import_id, e.event_id, e.stream_sequence, t.source_name
        ORDER BY revision DESC, e.import_id LIMIT {NAMED_EVENTS}
    ), handed_on AS (
        -- 交下来的，从上游做好的那一刻起被要求
        SELECT u.asset, u.run_id
        FROM island i
        JOIN etl.ledger l ON l.target = :of_target AND l.asset = ANY (i.starts) AND l.day BETWEEN i.first_day AND i.last_day
        JOIN etl.assets a ON a.target = :of_target AND a.asset = l.asset
        JOIN etl.ledger u ON u.target = :of_target AND u.asset = ANY (a.upstreams) AND u.day = l.day
             AND u.materialized_at = l.requested_at
        WHERE u.run_id IS NOT NULL
        ORDER BY u.materialized_at DESC, u.asset LIMIT 1
    )
    SELECT first_day, last_day, available, failed_run_id, other_failed_run_id,
           CAST(extract(epoch FROM clock_timestamp() - since) AS double precision),
           ARRAY(
               SELECT a.asset FROM etl.assets a
               WHERE a.target = :of_target AND array_append(a.ancestors, a.asset) && starts
                     AND NOT coalesce(array_append(a.ancestors, a.asset) && stuck, false) AND {_IS_KNOWN}
               ORDER BY a.position
           ),
           (
               SELECT jsonb_agg(jsonb_build_array(import_id, event_id, stream_sequence, source_name) ORDER BY revision DESC, import_id)
               FROM newest
           ),
           (SELECT jsonb_build_array(asset, run_id) FROM handed_on),
           (SELECT run_id FROM leased)
    FROM island""").bindparams(  # noqa: S608  # 只拼接常量
    sa.bindparam("token", type_=sa.Uuid), sa.bindparam("seconds", type_=sa.Double)
)
