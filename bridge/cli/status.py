"""etl status：台账、队列、工人、死信、拒收，一页看完。"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from bridge.cli.options import print_rows, with_stack
from bridge.cli.output import say, say_json
from etl_assets.core.database_errors import translated_errors

_WATCH_SECONDS = 2.0


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Print again every two seconds until Ctrl-C.")
@with_stack
def status_command(as_json: bool, watch: bool) -> None:
    """Show the ledger, running runs, queue depth per lane, dead letters and rejected rows."""
    while True:
        report = _collect()
        if watch and not as_json:
            click.clear()
        if as_json:
            say_json(report, indent=None if watch else 2)
        else:
            _print(report)
        if not watch:
            return
        time.sleep(_WATCH_SECONDS)


def _collect() -> dict[str, Any]:
    from bridge.queue_depths import read_queue_depths
    from bridge.settings import get_bridge_settings
    from etl_assets.core.database_sync import get_engine
    from etl_assets.core.settings import get_settings
    from etl_assets.services import reports

    settings = get_settings()
    with translated_errors(), get_engine().connect() as connection:
        report: dict[str, Any] = {
            "ledger": [dict(row) for row in reports.ledger_summary(connection, settings)],
            "held": [dict(row) for row in reports.held_days(connection, settings)],
            "running": [dict(row) for row in reports.running_leases(connection, settings)],
            "rejected": [dict(row) for row in reports.rejected_by_rule(connection, settings)],
            "unpublished_events": reports.unpublished_events(connection),
        }
    return report | {"queues": asyncio.run(read_queue_depths(get_bridge_settings()))}


def _print(report: dict[str, Any]) -> None:
    for title in ("ledger", "held", "running", "queues", "rejected"):
        rows = report[title]
        if rows:
            print_rows(rows, list(rows[0]), "table", title=title)
    if report["unpublished_events"]:
        say(f"{report['unpublished_events']} completion events are not published yet")
