"""etl status：第一行说一切都好，或者哪里不对；下面是台账、工人、监听器、队列、失败、搁置、拒收，一页看完。"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import DAY, console, with_stack
from bridge.cli.output import cell, say_json
from bridge.cli.tables import table_of
from bridge.cli.why import show_day
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir
from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import get_settings

if TYPE_CHECKING:
    from bridge.alerts.rules import Alert
    from bridge.operations.overview import Overview

_WATCH_SECONDS = 2.0
_STYLES = {"error": "bold red", "warning": "yellow"}
# 给人看的列；--json 给全部
_TABLES = {
    "ledger": (
        "assets",
        {
            "asset": "asset",
            "newest_materialized_day": "newest day",
            "due": "due",
            "oldest_due_since": "due since",
            "waiting_to_retry": "to retry",
            "held": "held",
            "last_materialized_at": "last made",
            "last_scope": "scope",
        },
    ),
    "running": (
        "what the workers run",
        {
            "owner": "worker",
            "first_day": "first day",
            "last_day": "last day",
            "acquired_at": "since",
            "run_id": "run_id",
        },
    ),
    "queues": (
        "queues",
        {
            "queue": "queue",
            "waiting": "waiting",
            "in_progress": "in progress",
            "takers": "takers",
            "last_taken_at": "last taken",
            "full": "% full",
        },
    ),
    "failed": (
        "failed runs of the last day",
        {
            "failed_at": "at",
            "asset": "asset",
            "first_day": "first day",
            "last_day": "last day",
            "still_due": "still due",
            "reason": "reason",
            "run_id": "run_id",
        },
    ),
    "held": (
        "held days",
        {"asset": "asset", "day": "day", "held_reason": "reason", "remedy": "once the cause is gone"},
    ),
    "rejected": ("newest rejected rows, by rule", {"rule": "rule", "rows": "rows"}),
    "troubles": (
        "ended beside the work in the last hour",
        {"process": "process", "task": "task", "times": "times", "last_at": "last", "message": "message"},
    ),
}


@dataclass(frozen=True)
class _Seen:
    overview: Overview
    alerts: Sequence[Alert]

    @property
    def headline(self) -> str:
        if not self.alerts:
            return "all well"
        more = len(self.alerts) - 1
        return self.alerts[0].says + (f" (and {more} more)" if more else "")

    def as_dict(self) -> dict[str, Any]:
        told = ("key", "severity", "en", "zh", "remedy", "size")
        alerts = [{name: getattr(alert, name) for name in told} for alert in self.alerts]
        return {"headline": self.headline, "alerts": alerts, **self.overview.as_dict()}


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; see docs/status.md.")
@click.option("--watch", is_flag=True, help="Look again every two seconds until Ctrl-C.")
@click.option("--day", type=DAY, help="Only this business day, as `etl why day` does.")
@with_stack
def status_command(as_json: bool, watch: bool, day: datetime | None) -> None:
    """Say "all well" or what is not; then assets, workers, listeners, queues, failed runs, held days, rejected rows."""
    if day is not None:
        if watch:
            raise click.UsageError("--watch is for the whole status: leave out --day or --watch")
        show_day(day, as_json=as_json)
        return
    if watch and not as_json and sys.stdout.isatty():
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                live.update(Group(*_shown(_look())), refresh=True)
                time.sleep(_WATCH_SECONDS)
    while True:
        seen = _look()
        if as_json:
            say_json(seen.as_dict(), indent=None if watch else 2)
        else:
            for line in _shown(seen):
                console().print(line, soft_wrap=isinstance(line, Text))
        if not watch:
            is_readable = seen.overview.ledger is not None and seen.overview.queues is not None
            sys.exit(ExitCode.DONE if is_readable else ExitCode.NO_ANSWER)
        time.sleep(_WATCH_SECONDS)


def _look() -> _Seen:
    """一个服务器不在，另一个照看。"""
    from bridge.alerts.rules import find_alerts
    from bridge.operations.overview import look

    settings = get_bridge_settings()
    overview = look(get_engine(), get_settings(), settings, state_dir=default_state_dir())
    return _Seen(overview, find_alerts(overview, settings))


def _shown(seen: _Seen) -> Iterator[RenderableType]:
    overview = seen.overview
    yield cell(seen.headline, _STYLES[seen.alerts[0].severity] if seen.alerts else "bold green")
    for alert in seen.alerts[1:]:
        yield cell(f"also: {alert.says}", _STYLES[alert.severity])
    for line in (*_processes(overview), *_lag(overview), *_events(overview)):
        yield cell(line)
    for name, (title, columns) in _TABLES.items():
        if rows := getattr(overview, name):
            renamed = [{shown: row[column] for column, shown in columns.items()} for row in rows]
            yield table_of(renamed, list(columns.values()), title=title)


def _processes(overview: Overview) -> Iterator[str]:
    """监听器与工人：没有登记，有人等着取就是空着，有租约就是忙着。"""
    from bridge.nats_names import EVENTS_STREAM

    if overview.queues is None:
        return
    events = [row for row in overview.queues if row["queue"].startswith(f"{EVENTS_STREAM}.")]
    lanes = [row for row in overview.queues if row["takers"] is not None and row not in events]
    taken = max((row["last_taken_at"] for row in events if row["last_taken_at"]), default=None)
    last = f", the newest event was taken {_ago(taken)}" if taken else ""
    yield f"listeners: {_most_takers(events)} wait for events{last}"
    busy = "" if overview.running is None else f"{len(overview.running)} busy, "
    yield f"workers: {busy}{_most_takers(lanes)} idle"


def _most_takers(queues: Sequence[Mapping[str, Any]]) -> int:
    """一个进程在它服务的每个队列上各等着一次。"""
    return max((row["takers"] or 0 for row in queues), default=0)


def _lag(overview: Overview) -> Iterator[str]:
    if overview.lag and overview.lag["days"]:
        p50, p99, days = (overview.lag[name] for name in ("p50_seconds", "p99_seconds", "days"))
        yield f"from event to data, last hour: p50 {p50:.1f} s, p99 {p99:.1f} s ({days:,} days)"


def _events(overview: Overview) -> Iterator[str]:
    if overview.unpublished_events:
        yield f"{overview.unpublished_events:,} completion events are not published yet"
    if overview.waiting_events and overview.waiting_events["events"]:
        yield "{events:,} events wait for their imports, the oldest since {oldest}".format(**overview.waiting_events)


def _ago(moment: datetime) -> str:
    return f"{timedelta(seconds=max(0, round((datetime.now(UTC) - moment).total_seconds())))} ago"
