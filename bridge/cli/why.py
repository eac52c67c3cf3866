"""etl why：这一行为什么是这样，从结果回到文件。"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from bridge.cli.options import DAY, transaction, with_stack
from bridge.cli.output import say, say_json
from bridge.settings import get_bridge_settings
from etl_assets.core.settings import get_settings

if TYPE_CHECKING:
    from bridge.cli.why_tree import Node

_shop = click.option("--shop", help="Only in the shop of this name.")


def _as_asked(command: Callable[..., None]) -> Callable[..., None]:
    """每个都有的选项。"""
    url = click.option("--url", "ui_url", help="Address of the Dagster UI [default: ETL_UI_URL, or that of the stack].")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, see docs/why.md.")
    return url(as_json(with_stack(command)))


@click.group("why")
def why_command() -> None:
    """Say where a row comes from: file, import, event, run, earlier versions, what a person did, what is due.

    Exit code 2, and one sentence that says where it looked, for what never existed.
    """


@why_command.command("order")
@click.argument("order_id")
@_shop
@_as_asked
def order_command(order_id: str, shop: str | None, as_json: bool, ui_url: str | None) -> None:
    """Every raw row of an order in each shop that has it, and what became of it."""
    _answer("order", as_json, ui_url, order_id=order_id, shop=shop)


@why_command.command("customer")
@click.argument("name")
@_shop
@_as_asked
def customer_command(name: str, shop: str | None, as_json: bool, ui_url: str | None) -> None:
    """A customer by the whole nickname: figures, newest orders, leads."""
    _answer("customer", as_json, ui_url, name=name, shop=shop)


@why_command.command("lead")
@click.argument("lead_id", type=click.UUID)
@_as_asked
def lead_command(lead_id: UUID, as_json: bool, ui_url: str | None) -> None:
    """A lead: its orders, its customer, what a person changed."""
    _answer("lead", as_json, ui_url, lead_id=lead_id)


@why_command.command("import")
@click.argument("import_id", type=click.UUID)
@_as_asked
def import_command(import_id: UUID, as_json: bool, ui_url: str | None) -> None:
    """An import: its event, what became of its rows, its days."""
    _answer("import", as_json, ui_url, import_id=import_id)


@why_command.command("day")
@click.argument("day", type=DAY, metavar="DAY")
@_as_asked
def day_command(day: datetime, as_json: bool, ui_url: str | None) -> None:
    """A business day: imports and events that touched it, runs that made it, what was rejected, what is due."""
    show_day(day, as_json=as_json, ui_url=ui_url)


def show_day(day: datetime, *, as_json: bool, ui_url: str | None = None) -> None:
    """也是 `etl status --day`。"""
    _answer("day", as_json, ui_url, day=day.date())


def _answer(subject: str, as_json: bool, ui_url: str | None, **asked: Any) -> None:
    from bridge.cli import why_tree
    from bridge.operations.why import answers
    from bridge.operations.why.elsewhere import Elsewhere
    from etl_assets.reports.why import BY_INDEX

    elsewhere = Elsewhere(ui_url=ui_url or os.environ.get("ETL_UI_URL"))
    with transaction() as connection:
        connection.execute(BY_INDEX)
        answer = getattr(answers, f"of_{subject}")(connection, get_settings(), elsewhere, **asked)
    elsewhere.fill(get_bridge_settings())
    if as_json:
        say_json({"subject": subject, **answer, "notes": elsewhere.notes})
        return
    trees: list[Node] = getattr(why_tree, f"{subject}_trees")(answer)
    for tree in trees:
        why_tree.print_tree(tree)
    for note in elsewhere.notes:
        say(f"note: {note}", err=True)
