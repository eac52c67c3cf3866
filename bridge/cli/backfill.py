"""etl backfill：重做一段日子，走同一条队列。"""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime

import click

from bridge.cli.events import wait_until_done
from bridge.cli.options import with_stack

_DAY = click.DateTime(["%Y-%m-%d"])


@click.command("backfill")
@click.option("--from", "first", type=_DAY, required=True, help="First business day.")
@click.option("--to", "last", type=_DAY, required=True, help="Last business day, included.")
@click.option(
    "--asset",
    type=click.Choice(["orders", "customers", "leads"]),
    default="orders",
    show_default=True,
    help="Start at this asset; what follows it is done too.",
)
@click.option("--allow-deletes", is_flag=True, help="Allow more deletes than ETL_MAX_DELETE_SHARE.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Stop waiting after this many seconds.",
)
@with_stack
def backfill_command(first: datetime, last: datetime, asset: str, allow_deletes: bool, timeout_seconds: float) -> None:
    """Materialize a range of days again and wait: exit 0 when done, 1 when it failed, 2 on timeout."""
    from bridge.doorbell import ring_workers
    from bridge.settings import get_bridge_settings
    from etl_assets.core.business_day import DayRange, partition_range
    from etl_assets.core.database_errors import translated_errors
    from etl_assets.core.database_sync import get_engine
    from etl_assets.core.errors import SettingsError
    from etl_assets.core.settings import get_settings
    from etl_assets.services import ledger
    from etl_assets.services.reports import range_progress

    settings = get_settings()
    days, partitions = DayRange(first.date(), last.date()), partition_range(settings)
    if days.first < partitions.first or days.last > partitions.last:
        raise SettingsError(f"{days} is outside the partitions {partitions}: choose days inside, or set ETL_PARTITIONS_START")
    with translated_errors(), get_engine().begin() as connection:
        upstream = ledger.before(asset)
        if upstream is None:
            ledger.request_days(connection, settings.target_schema, days, deletes_allowed_on=days if allow_deletes else ())
        else:
            ledger.request_downstream(connection, settings.target_schema, upstream, days)
    asyncio.run(ring_workers(get_bridge_settings(), "bulk"))
    sys.exit(wait_until_done(str(days), lambda connection: range_progress(connection, settings, days), timeout_seconds=timeout_seconds))
