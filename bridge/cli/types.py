"""etl types：平台的订单类型各算打样、产前样还是大货。"""

from __future__ import annotations

from collections.abc import Mapping

import click

from bridge.cli.options import Format, print_rows, transaction, with_stack
from bridge.cli.output import say
from etl_assets.core.settings import get_settings
from etl_assets.core.tables import SYSTEM_ORDER_TYPES
from etl_assets.core.text import WHITE_SPACE


@click.group("types", invoke_without_command=True)
@click.option("--format", "how", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@with_stack
@click.pass_context
def types_command(ctx: click.Context, how: Format) -> None:
    """List which order types of the platforms are SAMPLE, PROOF or BULK; set and remove them.

    Types that are not in the list count as BULK, with a warning.
    """
    if ctx.invoked_subcommand is not None:
        return
    from etl_assets.intake.order_types import read_order_types

    with transaction() as connection:
        types = read_order_types(connection)
    rows = [{"order_type": raw, "counts_as": system} for raw, system in types.items()]
    print_rows(rows, ["order_type", "counts_as"], how)


@types_command.command("set")
@click.argument("pairs", nargs=-1, required=True, metavar="TYPE=KIND...")
@with_stack
def set_command(pairs: tuple[str, ...]) -> None:
    """Say what order types count as: `etl types set 打样订单=SAMPLE 大货订单=BULK`. KIND is SAMPLE, PROOF or BULK."""
    from etl_assets.intake.order_types import read_order_types, set_order_types

    types = dict(map(_parse, pairs))
    with transaction() as connection:
        before = read_order_types(connection)
        set_order_types(connection, types)
    _say_changes(before, {**before, **types})


@types_command.command("remove")
@click.argument("types", nargs=-1, required=True, metavar="TYPE...")
@with_stack
def remove_command(types: tuple[str, ...]) -> None:
    """Take order types out of the list; they count as BULK then."""
    from etl_assets.intake.order_types import read_order_types, remove_order_types

    with transaction() as connection:
        before = read_order_types(connection)
        unknown = [name for name in types if name not in before]
        if unknown:
            raise click.UsageError(f"{', '.join(map(repr, unknown))} is not in the list: `etl types` shows it")
        remove_order_types(connection, types)
    _say_changes(before, {raw: system for raw, system in before.items() if raw not in types})


def _parse(pair: str) -> tuple[str, str]:
    raw, equals, system = pair.rpartition("=")
    # 修剪得与 ETL 一样，不然永远对不上
    raw, system = raw.strip(WHITE_SPACE), system.strip().upper()
    if not equals or not raw or system not in SYSTEM_ORDER_TYPES:
        raise click.UsageError(f"{pair!r} is not TYPE=KIND with a KIND of {', '.join(SYSTEM_ORDER_TYPES)}")
    return raw, system


def _say_changes(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> None:
    """改了什么（照它可以改回去），与怎样让做好了的日子也照新的来。"""
    from etl_assets.intake.order_types import first_and_last_day

    changed = [raw for raw in {**before, **after} if before.get(raw) != after.get(raw)]
    for raw in changed:
        say(f"{raw}: {before.get(raw) or 'not in the list'} -> {after.get(raw) or 'not in the list'}")
    if not changed:
        say("nothing to change")
        return
    with transaction() as connection:
        days = first_and_last_day(connection, get_settings())
    if days:
        say(
            "days that are done take it when they are made again:"
            f" etl backfill --from {days[0]} --to {days[1]} (or the days you need)",
            err=True,
        )
