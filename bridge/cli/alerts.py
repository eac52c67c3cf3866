"""etl alerts：此刻什么不对、说过没有；给每个地址发一条测试。"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import print_rows, transaction, with_stack
from bridge.cli.output import say, say_json
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import EtlError, SettingsError
from etl_assets.core.settings import get_settings

_SET_IT = "set it where `etl listen` and `etl worker` run"
_NOT_SET = f"ETL_ALERT_URLS is not set, so nobody is told: {_SET_IT}"
_NOBODY_LOOKS = f"no process looks for alerts now, nobody is told: is ETL_ALERT_URLS set? {_SET_IT}"


@click.group("alerts")
def alerts_command() -> None:
    """What is wrong, and who is told (ETL_ALERT_URLS)."""


@alerts_command.command("test")
def test_command() -> None:
    """Send a test message to every address in ETL_ALERT_URLS; say whether it was taken. Exit 1 when one was not."""
    from bridge.alerts.messages import test_message, where_we_are
    from bridge.alerts.webhooks import channels_of

    settings = get_bridge_settings()
    if not settings.alert_urls:
        raise SettingsError(_NOT_SET)
    message = test_message(language=settings.alert_language, where=where_we_are(settings.target_schema))
    failed = False
    for channel in channels_of(settings.alert_urls):
        try:
            channel.send(message)
            say(f"{channel.name} ({channel.shown}): taken")
        except EtlError as error:
            failed = True
            say(f"{channel.name} ({channel.shown}): not taken, {error}")
    sys.exit(ExitCode.FAILED if failed else ExitCode.DONE)


@alerts_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@with_stack
def list_command(as_json: bool) -> None:
    """List what is wrong, since when, and which addresses were told."""
    from bridge.alerts.rules import find_alerts
    from bridge.operations.overview import look
    from etl_assets.ledger.alerts import read_alerts, read_watcher

    settings = get_bridge_settings()
    overview = look(get_engine(), get_settings(), settings, state_dir=default_state_dir())
    known: dict[str, Mapping[str, Any]] = {}
    watcher = None
    if overview.ledger is not None:
        with transaction() as connection:
            known = {row["key"]: row for row in read_alerts(connection, get_settings().target_schema)}
            watcher = read_watcher(connection, get_settings().target_schema)
    found = {alert.key: asdict(alert) for alert in find_alerts(overview, settings)}
    rows = [_row(key, found.get(key) or known[key], known.get(key)) for key in [*found, *(known.keys() - found.keys())]]
    if as_json:
        say_json(rows)
        return
    if rows:
        print_rows(rows, ["severity", "since", "told", "problem", "remedy"], "table")
    else:
        say("nothing is wrong")
    if watcher is None:
        say(_NOBODY_LOOKS, err=True)


def _row(key: str, found: Mapping[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    """此刻看到的，与看着的进程记下的：从何时起，告诉了谁。"""
    over = " (over, not yet told)" if known and known["over_at"] else ""
    return {
        "key": key,
        "severity": found["severity"],
        "since": known["since"] if known else None,
        "told": ", ".join(sorted(known["said"])) + over if known and known["said"] else "no" + over,
        "problem": found[get_bridge_settings().alert_language],
        "remedy": found["remedy"],
    }
