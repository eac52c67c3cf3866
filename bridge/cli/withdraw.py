"""etl withdraw：把一次导入收回来。"""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

import click

from bridge.cli.abort import say_on_abort
from bridge.cli.events import wait_until_done
from bridge.cli.options import confirm, timeout_option, transaction, with_stack
from bridge.cli.output import say
from bridge.settings import get_bridge_settings
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.settings import get_settings


@click.command("withdraw")
@click.argument("import_id", type=click.UUID)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show the days and orders that it affects, change nothing.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the days are materialized.")
@timeout_option(300.0)
@with_stack
def withdraw_command(import_id: UUID, yes: bool, dry_run: bool, no_wait: bool, timeout_seconds: float) -> None:
    """Take an import back: each order returns to its version of an earlier import, or leaves the tables.

    Exit 0 when done, 1 when it failed, 2 on timeout; running it again finishes what was begun. You have seen the number of orders, so
    ETL_MAX_DELETE_SHARE does not stop it.
    """
    from bridge.events.envelope import DataImportCompleted
    from bridge.events.publish import publish_event
    from bridge.events.subjects import DATA_IMPORT_COMPLETED
    from etl_assets.core.business_day import contiguous_ranges
    from etl_assets.intake import withdrawal
    from etl_assets.reports.progress import import_progress

    say_on_abort("aborted, nothing was withdrawn")
    settings = get_settings()
    before = transact(get_engine(), withdrawal.read_traces, settings, import_id)
    if before.is_gone:
        say(f"import {import_id} is withdrawn already, nothing of it is in the tables")
        return
    ranges = ", ".join(map(str, contiguous_ranges(before.days))) or "none"
    say(
        f"{before.own_orders:,} orders come from import {import_id}; days to materialize again: {len(before.days)} ({ranges})",
        err=True,
    )
    if dry_run:
        say("dry run: nothing was changed")
        return
    confirm(f"Withdraw import {import_id}?", yes=yes)
    transact(get_engine(), withdrawal.mark_withdrawn, import_id)
    not_announced = f"import {import_id} is marked as withdrawn but was not announced"
    say_on_abort(f"{not_announced}: run this again")
    # 提交之后的时刻：此后处理的事件都看得见撤回，是谁发的都一样
    with transaction() as connection:
        since = withdrawal.database_time(connection)
        in_ledger = withdrawal.concerns_ledger(connection, settings, import_id)
    event = DataImportCompleted.model_validate({"import_id": import_id, "status": "failed", "allow_deletes": True})
    try:
        asyncio.run(publish_event(DATA_IMPORT_COMPLETED, event, settings=get_bridge_settings()))
    except Exception:
        say(f"{not_announced}: once NATS is back, run this again", err=True)
        raise
    say_on_abort(f"stopped waiting; import {import_id} is withdrawn and the workers go on: see `etl status`")
    if not in_ledger:
        say(f"import {import_id} is withdrawn; none of it had reached the tables")
        return
    if no_wait:
        say(f"import {import_id} is withdrawn; `etl status` shows the days that are still due")
        return
    code = wait_until_done(
        f"withdrawal of {import_id}",
        lambda connection: import_progress(connection, settings, import_id, since=since),
        timeout_seconds=timeout_seconds,
    )
    if code:
        sys.exit(code)
    left, _ = transact(get_engine(), withdrawal.count_orders, settings, import_id)
    removed = max(before.named_orders - left, 0)
    replaced = max(before.own_orders - removed, 0)
    say(
        f"days materialized: {len(before.days)}; orders removed: {removed:,}; replaced by an older version: {replaced:,}"
    )
