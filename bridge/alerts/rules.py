"""什么不对：每种一段，两种语言、怎么办。`etl status` 的第一行与 webhook 收到的都由此而来，所以说的总是同一件事。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from bridge.jetstream.streams import NEARLY_FULL
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM, TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.operations.overview import Overview
from bridge.settings import LANES, BridgeSettings
from etl_assets.intake.named_orders import SCATTERED_REMEDY

Severity = Literal["error", "warning"]

RESTART_SECONDS = 60.0
"""进程重起、服务器重起要一会儿：这么久还没有好才说。"""
BUSY_SECONDS = 180.0
FLICKER_SECONDS = 300.0
"""在界限上下来回的（磁盘、流、等了多久），持续这么久才说。"""
"""空着的工人不取一条车道：服务它的也许都忙着，这么久还没有人取才说。"""
_JUST_TAKEN = timedelta(seconds=30)


@dataclass(frozen=True)
class Alert:
    """一件不对的事。key 认出它；size 多大：变大了值得再说；remedy 是修好它、或者看清它的命令，哪种语言都一样。

    :param source: 从哪里看出来的；看不到那里时，不知道它好了没有。
    :param settle_seconds: 持续这么久才说，好了这么久才说好了。
    :param is_stored: 由看着的进程记下、说给 webhook 听；不然只给 status 看。
    """

    key: str
    source: str
    severity: Severity
    en: str
    zh: str
    remedy: str
    size: int = 1
    settle_seconds: float = 0.0
    is_stored: bool = True

    @property
    def says(self) -> str:
        return f"{self.en}: {self.remedy}"


def find_alerts(overview: Overview, settings: BridgeSettings) -> list[Alert]:
    """急的在前。"""
    rules = (
        _servers,
        _processes,
        _accounting,
        _held,
        _dead_letters,
        _fullness,
        _lag,
        _freshness,
        _checks,
        _beside,
        _unsaid,
    )
    # 一个键说两遍，存不下；说的是同一件事
    found = {alert.key: alert for rule in rules for alert in rule(overview, settings)}
    return sorted(found.values(), key=lambda alert: alert.severity)  # error < warning；同样急的照上面的次序


def seen_sources(overview: Overview) -> set[str]:
    """这回看得见的来源。"""
    seen = {"database": overview.ledger, "nats": overview.queues, "host": overview.disk}
    return {source for source, found in seen.items() if found is not None}


def _servers(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    if overview.database:
        yield database_alert(overview.database)
    if overview.nats:
        yield Alert(
            "nats",
            "host",
            "error",
            f"nats: {overview.nats}; events and tasks wait until it is back",
            f"NATS：{overview.nats}；事件与任务都等着，它回来之后自己接着做",
            "`etl doctor`",
            settle_seconds=RESTART_SECONDS,
        )


def database_alert(problem: str) -> Alert:
    return Alert(
        "database",
        "database",
        "error",
        f"database: {problem}; events and tasks wait until that is mended",
        f"数据库：{problem}；事件与任务都等着，修好之后自己接着做",
        "`etl doctor`",
        settle_seconds=RESTART_SECONDS,
    )


def _processes(overview: Overview, settings: BridgeSettings) -> Iterator[Alert]:
    queues = overview.queues or ()
    events = [row for row in queues if row["queue"].startswith(f"{EVENTS_STREAM}.")]
    if events and not any(map(is_taken, events)):
        waiting = _waiting(events)
        yield Alert(
            "listener",
            "nats",
            "error",
            f"no listener is running, {waiting:,} events wait for it",
            f"没有监听器在运行，{waiting:,} 个事件等着",
            "`etl listen`",
            settle_seconds=RESTART_SECONDS,
        )
    tasks = {
        lane: row for row in queues for lane in LANES if row["queue"] == f"{settings.own_name(TASKS_STREAM)}.{lane}"
    }
    if not tasks or overview.running is None:
        return
    if not overview.running and not any(map(is_taken, tasks.values())):
        waiting = _waiting(tasks.values())
        yield Alert(
            "workers",
            "nats",
            "error",
            f"no worker is running, {waiting:,} tasks wait for it",
            f"没有工人在运行，{waiting:,} 个任务等着",
            "`etl worker`",
            settle_seconds=RESTART_SECONDS,
        )
        return
    has_idle = any(row["takers"] for row in tasks.values())
    for lane, row in tasks.items():
        # 全都忙着的不算：它们做完就来取；有空着的而不取，就是没有谁服务这条车道
        if row["waiting"] and has_idle and not is_taken(row):
            yield Alert(
                f"lane {lane}",
                "nats",
                "error",
                f"no worker takes the {row['waiting']:,} tasks of lane {lane}, though some are idle",
                f"有工人空着，{lane} 车道的 {row['waiting']:,} 个任务却没有人取",
                f"`etl worker --lanes {lane}`",
                settle_seconds=BUSY_SECONDS,
            )


def is_taken(queue: Mapping[str, Any]) -> bool:
    """有进程等着取，或者刚取走一批正在做。推迟了的也算没有确认，所以光有没确认的还不够。"""
    if queue["takers"]:
        return True
    last = queue["last_taken_at"]
    return bool(queue["in_progress"]) and last is not None and datetime.now(UTC) - last < _JUST_TAKEN


def _waiting(queues: Any) -> int:
    return sum(row["waiting"] or 0 for row in queues)


def _accounting(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    if overview.unbalanced:
        day, asset, reason = (overview.unbalanced[0][name] for name in ("day", "asset", "reason"))
        yield Alert(
            "accounting",
            "database",
            "error",
            f"the accounts of {asset} are broken on {day}: {reason}",
            f"{asset} 在 {day} 的账不平，什么也没有写：{reason}",
            "`etl status`",
        )


def _held(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    for row in overview.ledger or ():
        if row["held"]:
            asset, days = row["asset"], row["held"]
            first = next((held for held in overview.held or () if held["asset"] == asset), None)
            en, zh = (
                (
                    f", the first {first['day']}: {first['held_reason']}",
                    f"，最早的是 {first['day']}：{first['held_reason']}",
                )
                if first
                else ("", "")
            )
            yield Alert(
                f"held {asset}",
                "database",
                "error",
                f"{days:,} days of {asset} are held{en}; once the cause is gone, ask for them again",
                f"{asset} 有 {days:,} 天搁置了{zh}；缘由没了就再要求一次",
                f"`{first['remedy']}`" if first else "`etl status`",
                size=days,
            )


def _dead_letters(overview: Overview, settings: BridgeSettings) -> Iterator[Alert]:
    for kind, stream in (("events", EVENTS_DLQ_STREAM), ("tasks", settings.own_name(TASKS_DLQ_STREAM))):
        letters = _waiting(row for row in overview.queues or () if row["queue"] == stream)
        if letters:
            yield Alert(
                f"dead letters of {kind}",
                "nats",
                "error",
                f"{letters:,} dead letters in {stream}",
                f"{stream} 里有 {letters:,} 封死信",
                "`etl dlq list`",
                size=letters,
            )


def _fullness(overview: Overview, settings: BridgeSettings) -> Iterator[Alert]:
    letters = (EVENTS_DLQ_STREAM, settings.own_name(TASKS_DLQ_STREAM))
    for row in overview.queues or ():
        if (row["full"] or 0) >= NEARLY_FULL * 100:
            stream, full = row["queue"], row["full"]
            yield Alert(
                f"full {stream}",
                "nats",
                "error",
                f"{stream} is {full} % full, then it takes nothing more",
                f"{stream} 满了 {full} %，全满了就不再收",
                "`etl dlq list`" if stream in letters else f"`nats stream edit {stream}`",
                settle_seconds=FLICKER_SECONDS,
            )
    if overview.disk and overview.disk.is_nearly_full:
        gib, folder = f"{overview.disk.free_bytes / (1 << 30):.1f} GiB", overview.disk.folder
        yield Alert(
            "disk",
            "host",
            "error",
            f"only {gib} are free on the disk of {folder}",
            f"{folder} 的磁盘只剩 {gib}",
            f"`du -h {folder} | sort -h | tail`",
            settle_seconds=FLICKER_SECONDS,
        )


def _lag(overview: Overview, settings: BridgeSettings) -> Iterator[Alert]:
    late = [row for row in overview.ledger or () if (row["oldest_due_seconds"] or 0) > settings.alert_lag_seconds]
    if late:
        worst = max(late, key=lambda row: row["oldest_due_seconds"])
        minutes = worst["oldest_due_seconds"] // 60
        yield Alert(
            "lag",
            "database",
            "error",
            f"{worst['due']:,} days of {worst['asset']} are due, the oldest for {minutes:.0f} minutes",
            f"{worst['asset']} 有 {worst['due']:,} 天到期没有做，最久的等了 {minutes:.0f} 分钟",
            "`etl status`",
            settle_seconds=FLICKER_SECONDS,
        )


def _freshness(overview: Overview, settings: BridgeSettings) -> Iterator[Alert]:
    hours = settings.alert_fresh_hours
    for row in overview.ledger or ():
        if hours and (row["last_materialized_seconds"] or 0) > hours * 3_600:
            since = row["last_materialized_seconds"] / 3_600
            yield Alert(
                f"freshness of {row['asset']}",
                "database",
                "error",
                f"nothing of {row['asset']} was made for {since:.0f} hours",
                f"{row['asset']} 有 {since:.0f} 小时没有做过了",
                "`etl imports`",
            )


def _checks(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    """它们已经在 etl.alerts 里，由检查自己收场。"""
    for row in overview.failed_checks or ():
        yield Alert(**{**row, "is_stored": False})


def _beside(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    """不急，但要有人知道。"""
    aside = overview.set_aside_events or {}
    if aside.get("events"):
        events, problem = aside["events"], aside["problem"]
        yield Alert(
            "set aside",
            "database",
            "warning",
            f"{events:,} completion events cannot be published and are set aside: {problem}",
            f"{events:,} 个完成事件发不出去，放在一边：{problem}",
            "`etl doctor`",
        )
    for row in overview.troubles or ():
        what = f"'{row['task']}' of {row['process']}"
        yield Alert(
            f"side task {what}",
            "database",
            "warning",
            f"{what} ended {row['times']} times in the last hour: {row['message']}",
            f"{row['process']} 旁边的活 '{row['task']}' 最近一小时结束了 {row['times']} 次：{row['message']}",
            "`etl doctor`",
        )
    if overview.indexes:
        yield Alert(
            "indexes",
            "database",
            "warning",
            f"indexes: {len(overview.indexes)} are missing or INVALID, work grows with the tables",
            f"缺 {len(overview.indexes)} 个索引，表越大做得越慢",
            "`etl init-db --create-indexes`",
        )
    for said in overview.scattered_orders or ():
        yield Alert(
            f"order ids {said.partition(' is in ')[0]}",
            "database",
            "warning",
            f"{said}: {SCATTERED_REMEDY}",
            f"像是占位的订单号，每个导入都牵动许多天：{said}",
            "`etl doctor`",
        )


def _unsaid(overview: Overview, _settings: BridgeSettings) -> Iterator[Alert]:
    """说不出去这件事不再去说。"""
    if overview.unsaid_alerts:
        yield Alert(
            "unsaid",
            "database",
            "warning",
            f"{overview.unsaid_alerts:,} alerts were taken by no webhook",
            f"{overview.unsaid_alerts:,} 个告警没有一个 webhook 收下",
            "`etl alerts test`",
            is_stored=False,
        )
