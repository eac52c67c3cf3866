"""etl replay：流里的事件再来一遍。"""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import click

from bridge.cli.abort import say_on_abort
from bridge.cli.options import print_rows, with_stack
from bridge.cli.output import say, say_json
from bridge.settings import get_bridge_settings
from etl_assets.core.settings import get_settings

if TYPE_CHECKING:
    from bridge.operations.replay import ReplayReport

_SHOWN_PROBLEMS = 10
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command("replay")
@click.option(
    "--since",
    metavar="T",
    help="From this time on: 2026-03-05, 2026-03-05T10:00 (in ETL_TIMEZONE), or how long ago: 2h, 3d.",
)
@click.option("--seq", "first_sequence", type=click.IntRange(min=1), help="From this sequence of the stream on.")
@click.option("--until", metavar="T", help="Only events before this time.")
@click.option("--to-seq", "last_sequence", type=click.IntRange(min=1), help="Only up to this sequence, included.")
@click.option(
    "--subject", help="Only events of this subject [default: imports, completions of another ETL, events of assets]."
)
@click.option("--dry-run", is_flag=True, help="Show what would be requested, write nothing.")
@click.option("--force", is_flag=True, help="Also events whose days the ledger says are materialized.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_stack
def replay_command(
    since: str | None,
    first_sequence: int | None,
    until: str | None,
    last_sequence: int | None,
    subject: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Ask again for the days of events in the stream EVENTS, for example after a database backup was restored.

    Does not wait for the runs: `etl status` shows what is due.
    """
    from bridge.operations.replay import replay_events, replayable_subjects
    from bridge.queue.doorbell import ring_workers

    say_on_abort("aborted; `etl status` shows what is due")
    if subject is not None and subject not in (subjects := asyncio.run(replayable_subjects())):
        raise click.BadParameter(f"only events of {', '.join(subjects)} can be replayed", param_hint="--subject")
    if (since is None) == (first_sequence is None):
        raise click.UsageError("say where to begin: --since T or --seq N")
    if until is not None and last_sequence is not None:
        raise click.UsageError("--until and --to-seq exclude each other")
    if first_sequence is not None and last_sequence is not None and last_sequence < first_sequence:
        raise click.UsageError(f"--seq {first_sequence} is after --to-seq {last_sequence}: give the earlier one first")
    zone = get_settings().zone
    report = asyncio.run(
        replay_events(
            get_bridge_settings(),
            first=first_sequence or _parse_instant(since or "", zone=zone, option="--since"),
            last_sequence=last_sequence,
            until=_parse_instant(until, zone=zone, option="--until") if until is not None else None,
            subject=subject,
            force=force,
            dry_run=dry_run,
        )
    )
    if not dry_run and report.counts["requested"]:
        asyncio.run(ring_workers(get_bridge_settings(), "bulk"))
    _print(report, dry_run=dry_run, as_json=as_json)


def _parse_instant(text: str, *, zone: ZoneInfo, option: str) -> datetime:
    """`2026-03-05`（那天零点）、`2026-03-05T10:00`、带时区的、`90m`、`2h`、`3d`；没有时区的按 zone。

    在命令里调，不做成 click 的类型：解析参数时栈的地址还没有放进环境变量，那时读设置就读早了。
    """
    try:
        if ago := re.fullmatch(r"([0-9]{1,9})([smhdw])", text.strip()):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        instant = datetime.fromisoformat(text.strip())
        return (instant if instant.tzinfo else instant.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is not a time: write 2026-03-05, 2026-03-05T10:00, 2026-03-05T10:00+08:00, or how long ago: 90m, 2h, 3d",
            param_hint=option,
        ) from error


def _print(report: ReplayReport, *, dry_run: bool, as_json: bool) -> None:
    from etl_assets.core.business_day import contiguous_ranges

    counts = {
        "events": report.counts.total(),
        **{
            verdict: report.counts[verdict]
            for verdict in ("requested", "skipped", "ignored", "not_completed", "invalid")
        },
    }
    partitions = {asset: [str(days) for days in contiguous_ranges(report.days[asset])] for asset in report.days}
    if as_json:
        content = {
            "dry_run": dry_run,
            **counts,
            "partitions": partitions,
            "problems": [asdict(problem) for problem in report.problems],
        }
        say_json(content | {"stream_begins_late_at": report.begins_late_at})
        return
    if report.begins_late_at is not None:
        say(f"warning: the stream begins at sequence {report.begins_late_at}, older events are gone", err=True)
    print_rows([counts], list(counts), "table", title="dry run: nothing was written" if dry_run else None)
    rows = [
        {"asset": asset, "days": len(report.days[asset]), "partitions": ", ".join(ranges)}
        for asset, ranges in partitions.items()
    ]
    if report.counts["requested"]:
        print_rows(rows, list(rows[0]), "table")
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        say(
            f"sequence {problem.sequence} ({problem.subject}): {problem.verdict.replace('_', ' ')}: {problem.reason}",
            err=True,
        )
    if (more := report.counts["invalid"] + report.counts["not_completed"] - _SHOWN_PROBLEMS) > 0:
        say(f"and {more} more; --json names the first {len(report.problems)}", err=True)
