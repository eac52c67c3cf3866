"""告警说过什么：不对的事各一行，告诉了谁、过去了没有；几个进程里只有一个在看、在说。时刻都以数据库的时钟为准。"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from etl_assets.core.etl_tables import alerts

AGAIN_SECONDS = 3_600
"""变大了的（又一封死信、又一天搁置）再说一次，至多这么久一次。"""
_UNSAID_SECONDS = 300
CHECKS = "checks"

Found = Mapping[str, Any]
"""alerts 的一行里由看的人填的：key、source、severity、en、zh、remedy、size、settle_seconds。"""


def claim_watch(
    connection: sa.Connection, target: str, watcher: str, *, lease_seconds: float, patience_seconds: float = 0
) -> bool:
    """接着看，或者从停了 patience_seconds 的人那里接过来；别人正看着是 False。"""
    values = {
        "target": target,
        "watcher": watcher,
        "lease_seconds": lease_seconds,
        "patience_seconds": patience_seconds,
    }
    return connection.execute(_CLAIM, values).first() is not None


def read_watcher(connection: sa.Connection, target: str) -> str | None:
    """哪个进程看着：主机、进程号；没有就是 None。"""
    watcher: str | None = connection.scalar(_WATCHER, {"target": target})
    return watcher


def store_alerts(connection: sa.Connection, target: str, found: Sequence[Found], *, sources: Collection[str]) -> None:
    """此刻不对的记下；不再有的标上过去了。

    :param sources: 这回看得见的来源：NATS 不在时，不知道监听器好了没有，不算好了。
    """
    connection.execute(_STORE, {"target": target, "found": json.dumps(list(found), ensure_ascii=False)})
    keys = [one["key"] for one in found]
    connection.execute(_END, {"target": target, "keys": keys, "sources": list(sources)})


def forget_alerts(connection: sa.Connection, target: str, channels: Sequence[str]) -> None:
    """过去了、这些 channels 里谁也不等着听的，删去；不再配置的，不等它。"""
    connection.execute(_FORGET, {"target": target, "channels": list(channels)})


def note_checks(connection: sa.Connection, target: str, asset: str, violations: Mapping[str, int]) -> None:
    """整张表的检查看出了什么：CHECKS 一类的，只有下一次检查知道好了没有。"""
    why = "make the days again; if it stays, something else writes these tables"
    zh = "那些日子重做一遍；还是这样，就有别的程序在写这些表"
    found = [
        {
            "key": f"check {asset}.{name}",
            "source": f"{CHECKS} {asset}",
            "severity": "error",
            "en": f"the check {name} of {asset} finds {rows:,} wrong: {why}",
            "zh": f"{asset} 的检查 {name} 发现 {rows:,} 处不对：{zh}",
            "remedy": f"`etl backfill --asset {asset}`",
            "size": rows,
            "settle_seconds": 0,
        }
        for name, rows in violations.items()
        if rows
    ]
    store_alerts(connection, target, found, sources=[f"{CHECKS} {asset}"])


def checked_alerts(connection: sa.Connection, target: str) -> Sequence[sa.RowMapping]:
    """表的检查看出来、还没有好的，像 Found 那样。"""
    return connection.execute(_CHECKED, {"target": target, "source": f"{CHECKS} "}).mappings().all()


def read_alerts(connection: sa.Connection, target: str) -> list[Mapping[str, Any]]:
    """没有过去的，与过去了还没有都告诉的；急的、早的在前。

    is_due：过了沉淀的时间，可以说了（过去了的：可以说过去了）；may_grow：离上次说够久了，变大了可以再说。
    """
    rows = connection.execute(_READ, {"target": target, "again_seconds": AGAIN_SECONDS}).mappings()
    return [dict(row) for row in rows]


def note_said(connection: sa.Connection, target: str, channel: str, said: Sequence[Mapping[str, Any]]) -> None:
    """channel 收下了这些；过去了的从它那里勾销。"""
    values = [
        {
            "of_target": target,
            "of_key": row["key"],
            "channel": channel,
            "told": row["size"],
            "is_over": bool(row["over_at"]),
        }
        for row in said
    ]
    connection.execute(_NOTE, values)


def count_unsaid(connection: sa.Connection, target: str) -> int:
    """有人在看，而早该说了、谁也没有收下的。"""
    return connection.scalar(_UNSAID, {"target": target, "seconds": _UNSAID_SECONDS}) or 0


_CLAIM = sa.text("""
    INSERT INTO etl.alert_watches AS held (target, watcher, watched_until)
    VALUES (:target, :watcher, clock_timestamp() + make_interval(secs => :lease_seconds))
    ON CONFLICT (target) DO UPDATE SET watcher = excluded.watcher, watched_until = excluded.watched_until
    WHERE held.watcher = excluded.watcher
          OR held.watched_until < clock_timestamp() - make_interval(secs => :patience_seconds)
    RETURNING target""")
_WATCHER = sa.text("SELECT watcher FROM etl.alert_watches WHERE target = :target AND watched_until > clock_timestamp()")
# 还没有说过去就又来了的，从来没有过去
_STORE = sa.text("""
    INSERT INTO etl.alerts AS known (target, key, source, severity, en, zh, remedy, size, settle_seconds)
    SELECT :target, key, source, severity, en, zh, remedy, size, settle_seconds
    FROM jsonb_to_recordset(CAST(:found AS jsonb)) AS found (
        key text, source text, severity text, en text, zh text, remedy text, size integer, settle_seconds float8
    )
    ON CONFLICT (target, key) DO UPDATE SET
        severity = excluded.severity, en = excluded.en, zh = excluded.zh, remedy = excluded.remedy,
        size = excluded.size, settle_seconds = excluded.settle_seconds, over_at = NULL""")
_END = sa.text("""
    UPDATE etl.alerts SET over_at = clock_timestamp()
    WHERE target = :target AND over_at IS NULL AND NOT key = ANY (:keys) AND source = ANY (:sources)""").bindparams(
    sa.bindparam("keys", type_=sa.ARRAY(sa.Text)), sa.bindparam("sources", type_=sa.ARRAY(sa.Text))
)
_FORGET = sa.text("""
    DELETE FROM etl.alerts
    WHERE target = :target AND over_at IS NOT NULL AND NOT jsonb_exists_any(said, :channels)""").bindparams(
    sa.bindparam("channels", type_=sa.ARRAY(sa.Text))
)
_READ = sa.text("""
    SELECT key, severity, en, zh, remedy, size, since, over_at, said, said_at,
           coalesce(over_at, since) + make_interval(secs => settle_seconds) <= clock_timestamp() AS is_due,
           said_at < clock_timestamp() - make_interval(secs => :again_seconds) AS may_grow
    FROM etl.alerts WHERE target = :target ORDER BY severity, since, key""")
_NOTE = (
    sa.update(alerts)
    .where(alerts.c.target == sa.bindparam("of_target"), alerts.c.key == sa.bindparam("of_key"))
    .values(
        said=sa.case(
            (sa.bindparam("is_over", type_=sa.Boolean), alerts.c.said.op("-")(sa.bindparam("channel", type_=sa.Text))),
            else_=alerts.c.said.concat(
                sa.func.jsonb_build_object(
                    sa.bindparam("channel", type_=sa.Text), sa.bindparam("told", type_=sa.Integer)
                )
            ),
        ),
        said_at=sa.func.clock_timestamp(),
    )
)
_CHECKED = sa.text("""
    SELECT key, source, severity, en, zh, remedy, size, settle_seconds FROM etl.alerts
    WHERE target = :target AND over_at IS NULL AND starts_with(source, :source) ORDER BY key""")
_UNSAID = sa.text("""
    SELECT count(*) FROM etl.alerts a JOIN etl.alert_watches w ON w.target = a.target
    WHERE a.target = :target AND a.over_at IS NULL AND a.said = '{}' AND w.watched_until > clock_timestamp()
          AND a.since + make_interval(secs => a.settle_seconds + :seconds) < clock_timestamp()""")
