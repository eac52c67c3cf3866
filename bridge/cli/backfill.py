"""etl backfill：重做一段日子，走同一条队列。"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import datetime
from functools import partial

import click

from bridge.cli.abort import say_on_abort
from bridge.cli.events import wait_until_done
from bridge.cli.options import DAY, timeout_option, transaction, with_stack
from bridge.cli.output import say
from bridge.settings import get_bridge_settings
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.errors import SettingsError
from etl_assets.core.settings import get_settings


@click.command("backfill")
@click.option("--from", "first", type=DAY, required=True, help="First business day.")
@click.option("--to", "last", type=DAY, required=True, help="Last business day, included.")
@click.option(
    "--asset",
    type=click.Choice(list(descriptions())),
    help="Start at this asset; what follows it is done too [default: all of them].",
)
@click.option(
    "--allow-deletes",
    is_flag=True,
    help="Allow more deletes than ETL_MAX_DELETE_SHARE, and of renamed shops.",
)
@timeout_option(3600.0)
@with_stack
def backfill_command(
    first: datetime, last: datetime, asset: str | None, allow_deletes: bool, timeout_seconds: float
) -> None:
    """Materialize a range of days again and wait: exit 0 when done, 1 when it failed, 2 on timeout."""
    from bridge.queue.doorbell import ring_workers
    from etl_assets.core.business_day import DayRange, partition_range
    from etl_assets.ledger.graph import read_graph
    from etl_assets.ledger.requests import request_days
    from etl_assets.reports.progress import range_progress

    say_on_abort("aborted; `etl status` shows what is due")
    if last < first:
        raise click.UsageError(f"--from {first.date()} is after --to {last.date()}: give the earlier day first")
    settings = get_settings()
    days, partitions = DayRange(first.date(), last.date()), partition_range(settings)
    if days.first < partitions.first or days.last > partitions.last:
        raise SettingsError(
            f"{days} is outside the partitions {partitions}: choose days inside, or set ETL_PARTITIONS_START"
        )
    with transaction() as connection:
        if asset is not None and asset not in (names := read_graph(connection, settings.target_schema).names):
            raise click.BadParameter(f"{asset!r} is not one of {', '.join(names)}", param_hint="--asset")
        request_days(
            connection, settings.target_schema, days, asset=asset, deletes_allowed_on=days if allow_deletes else ()
        )
    say_on_abort(f"stopped waiting; {days} is due and the workers go on: see `etl status`")
    asyncio.run(ring_workers(get_bridge_settings(), "bulk"))
    progress = partial(range_progress, settings=settings, days=days, asset=asset)
    started = time.monotonic()
    code = wait_until_done(str(days), progress, timeout_seconds=timeout_seconds)
    if code == 0:
        what = "all assets" if asset is None else f"{asset} and what follows it"
        say(f"{days} is materialized again: {what}, {time.monotonic() - started:.1f} s")
    sys.exit(code)
