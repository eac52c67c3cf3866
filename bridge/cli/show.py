"""etl show：不用 psql 也能看数据。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, datetime
from typing import Any
from uuid import UUID

import click

from bridge.cli.options import DAY, Format, print_rows, transaction, with_stack
from etl_assets.core.asset_folders import descriptions, has_module, import_of
from etl_assets.core.settings import get_settings

# 表格里给人看的列；CSV 与 JSON 给全部列
_COLUMNS = {
    **{asset: list(description.shown) for asset, description in descriptions().items()},
    "rejected": ["day", "rule", "raw_id", "order_id", "shop", "customer_name", "amount", "quantity", "ordered_at"],
}
_CELL_CHARACTERS = 60


@click.command("show")
@click.argument("table", type=click.Choice(list(_COLUMNS)))
@click.option("--customer", help="Only customers whose nickname contains this.")
@click.option(
    "--day",
    type=DAY,
    help="Only rows of this business day (of the last order, for customers and leads).",
)
@click.option("--lead", "lead_id", type=click.UUID, help="For orders: only those of this lead, oldest first.")
@click.option("--import-id", type=click.UUID, help="For rejected: only rows of this import.")
@click.option("--rule", help="For rejected: only rows that this rule rejected, for example unknown_shop.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=20,
    show_default=True,
    help="At most this many rows, newest first.",
)
@click.option("--format", "how", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@with_stack
def show_command(
    table: str,
    customer: str | None,
    day: datetime | None,
    lead_id: UUID | None,
    import_id: UUID | None,
    rule: str | None,
    limit: int,
    how: Format,
) -> None:
    """Show rows of one of the result tables, or the raw rows that were rejected; newest first.

    The text comes from buyers: CSV has a ' before what a spreadsheet would take for a formula; JSON has the values as they are.
    """
    from etl_assets.reports.shown_rows import show_rejected, show_rows

    if lead_id is not None and (not has_module(table, "of_lead") or customer is not None or day is not None):
        raise click.UsageError("--lead goes with `etl show orders`, without --customer and --day")
    if table != "rejected" and (import_id is not None or rule is not None):
        raise click.UsageError("--import-id and --rule go with `etl show rejected`")
    settings = get_settings()
    wanted: date | None = day.date() if day else None
    rows: Iterable[Mapping[Any, Any]]
    with transaction() as connection:
        if table == "rejected":
            rows = show_rejected(
                connection, settings, import_id=import_id, rule=rule, customer=customer, day=wanted, limit=limit
            )
        elif lead_id is not None:
            rows = import_of(table, "of_lead").read_of_lead(connection, settings, lead_id)[:limit]
        else:
            rows = show_rows(connection, settings, table, customer=customer, day=wanted, limit=limit)
    records = [dict(row) for row in rows]
    if how == "table":
        print_rows(map(_shorten, records), _COLUMNS[table], how)
    else:
        print_rows(records, list(records[0]) if records else _COLUMNS[table], how)


def _shorten(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """被拒收的文字可能有一兆长，别冲走整个终端。"""
    return {
        name: f"{value[:_CELL_CHARACTERS]}…" if isinstance(value, str) and len(value) > _CELL_CHARACTERS else value
        for name, value in row.items()
    }
