"""etl prune：过了保留期的现在就清，不等夜里。"""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import click

from bridge.cli.abort import say_on_abort
from bridge.cli.options import print_rows, with_stack
from bridge.cli.output import say, say_json
from bridge.settings import get_bridge_settings
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import SettingsError, TransientError
from etl_assets.core.settings import get_settings


@click.command("prune")
@click.option("--dry-run", is_flag=True, help="Count what would go, delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_stack
def prune_command(dry_run: bool, as_json: bool) -> None:
    """Delete now what is older than ETL_RETENTION_…_DAYS and not needed any more; a worker does it every night.

    Small transactions with pauses between them: it may run beside everything else, and be stopped and started again.
    """
    say_on_abort("aborted; what was deleted until now is gone, the rest goes the next time")
    from bridge.runs.retention import PRUNED

    removed = asyncio.run(_prune(dry_run=dry_run))
    if as_json:
        say_json({"dry_run": dry_run, **{name: removed[name] for name in PRUNED}})
        return
    rows = [{"what": name.replace("_", " "), "number": removed[name]} for name in PRUNED if removed[name]]
    if rows:
        print_rows(rows, ["what", "number"], "table")
    else:
        say("nothing has been kept long enough")
    if dry_run:
        say("dry run: nothing was deleted")


async def _prune(*, dry_run: bool) -> Counter[str]:
    from bridge.jetstream.connection import JetStreamConnection
    from bridge.runs.retention import Pruning, prune

    url = os.environ.get("DAGSTER_POSTGRES_URL")
    if not url:
        raise SettingsError("DAGSTER_POSTGRES_URL is not set: take it from `etl env`, Dagster's runs are there")
    settings = get_bridge_settings()
    async with JetStreamConnection(settings, name="prune") as connection:
        removed = await prune(Pruning(get_engine(), get_settings(), settings, connection, url), dry_run=dry_run)
    if removed is None:
        raise TransientError("another process is pruning at this moment: try again when it is done")
    return removed
