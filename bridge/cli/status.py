"""etl status：台账、队列、工人、死信、拒收，一页看完。"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import click

from bridge.cli.options import print_rows, transaction, with_stack
from bridge.cli.output import say, say_json
from bridge.errors import BridgeError
from bridge.settings import get_bridge_settings
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError
from etl_assets.core.log import redact
from etl_assets.core.settings import get_settings

_WATCH_SECONDS = 2.0
EXIT_UNREADABLE = 2
_TABLES = ("ledger", "held", "running", "queues", "rejected", "troubles")


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Print again every two seconds until Ctrl-C.")
@with_stack
def status_command(as_json: bool, watch: bool) -> None:
    """Show the ledger, running runs, queue depth per lane, dead letters, rejected rows and troubles of the last hour."""
    while True:
        report = _collect()
        if watch and not as_json:
            click.clear()
        if as_json:
            say_json(report, indent=None if watch else 2)
        else:
            _print(report)
        if not watch:
            sys.exit(EXIT_UNREADABLE if report["ledger"] is None or report["queues"] is None else 0)
        time.sleep(_WATCH_SECONDS)


def _collect() -> dict[str, Any]:
    """database 与 nats 是它们为什么不让做，None 是没有什么不对；一个不在，另一个照看。"""
    from bridge.operations.queues import read_queue_depths
    from etl_assets.ledger.troubles import recent_troubles, troubles_of_imports
    from etl_assets.reports import readiness, reports
    from etl_assets.reports.lookups import find_index_work

    settings = get_settings()
    report: dict[str, Any] = dict.fromkeys(
        ("database", "nats", *_TABLES, "unpublished_events", "set_aside_events", "waiting_events", "scattered_orders", "indexes")
    )
    try:
        with transaction() as connection:
            report |= {
                "ledger": [dict(row) for row in reports.ledger_summary(connection, settings)],
                "held": [dict(row) for row in reports.held_days(connection, settings)],
                "running": [dict(row) for row in reports.running_leases(connection, settings)],
                "rejected": [dict(row) for row in reports.rejected_by_rule(connection, settings)],
                "unpublished_events": reports.unpublished_events(connection),
                "set_aside_events": reports.set_aside_events(connection)._asdict(),
                "waiting_events": reports.count_waiting_events(connection, settings)._asdict(),
                "troubles": [dict(row) for row in recent_troubles(connection)],
                "scattered_orders": list(troubles_of_imports(connection, settings.target_schema)),
            }
            readiness.assert_usable(connection, settings.target_schema)
            report["indexes"] = [work.says for work in find_index_work(connection, settings)]
    except (DatabaseUnavailableError, DatabaseRefusedError) as error:
        report["database"] = redact(str(error))
    try:
        report["queues"] = asyncio.run(read_queue_depths(get_bridge_settings()))
    except BridgeError as error:
        report["nats"] = redact(str(error))
    return report


def _print(report: dict[str, Any]) -> None:
    from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY
    from bridge.jetstream.streams import NEARLY_FULL
    from etl_assets.intake.named_orders import SCATTERED_REMEDY

    if report["database"]:
        say(f"database: {report['database']}; events and tasks wait until that is mended\n")
    if report["nats"]:
        say(f"nats: {report['nats']}; events and tasks wait until it is back\n")
    if report["indexes"]:
        say(f"indexes: {len(report['indexes'])} are missing or INVALID, work grows with the tables; see `etl doctor`\n")
    for title in _TABLES:
        rows = report[title]
        if rows:
            print_rows(rows, list(rows[0]), "table", title=title)
    for queue in report["queues"] or ():
        if (queue["full"] or 0) >= NEARLY_FULL * 100:
            say(f"{queue['queue']} is {queue['full']} % full: {LETTERS_FULL_REMEDY}")
    for said in report["scattered_orders"] or ():
        say(f"{said}: {SCATTERED_REMEDY}")
    if report["unpublished_events"]:
        say(f"{report['unpublished_events']} completion events are not published yet")
    if report["set_aside_events"] and report["set_aside_events"]["events"]:
        say("{events} of them cannot be published and are set aside: {problem}".format(**report["set_aside_events"]))
    if report["waiting_events"] and report["waiting_events"]["events"]:
        say("{events} events wait for their imports, the oldest since {oldest}".format(**report["waiting_events"]))
