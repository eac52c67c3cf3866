"""一次导入读到了什么：几单、哪些日子、多少钱、各状态算作什么。"""

from __future__ import annotations

from bridge.cli.output import say
from bridge.imports.reading import ImportReport
from etl_assets.core.settings import EtlSettings

_SHOWN_STATUSES = 10
_MEANINGS = {"cancelled": " (cancelled, not counted)", "completed": " (completed)", "order": ""}


def say_figures(report: ImportReport, settings: EtlSettings) -> None:
    for merged in report.merged:
        say(f"column {merged.column!r}: {merged.taken}", err=True)
    if report.repeated_orders:
        say(
            f"{report.repeated_orders:,} order numbers come more than once: the last line of each is the order",
            err=True,
        )
    figures: list[str] = []
    if report.first_ordered_at and report.last_ordered_at:
        first, last = (
            moment.astimezone(settings.zone).date() for moment in (report.first_ordered_at, report.last_ordered_at)
        )
        figures.append(f"days {first} to {last}")
    if report.amount is not None:
        figures.append(f"sum of amounts {report.amount:,}" + (", all versions" if report.repeated_orders else ""))
    statuses = [
        f"{count.status or 'none'} {count.rows:,}{_MEANINGS[count.counts_as]}"
        for count in report.statuses[:_SHOWN_STATUSES]
    ]
    if statuses:
        hidden = len(report.statuses) - _SHOWN_STATUSES
        figures.append(f"statuses {', '.join(statuses)}" + (f" and {hidden:,} others" if hidden > 0 else ""))
    if figures:
        say("; ".join(figures), err=True)
