"""etl show：不用 psql 也能看数据。"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import click

from bridge.cli.options import Format, print_rows, with_stack
from etl_assets.core.database_errors import translated_errors

# 表格里给人看的列；CSV 与 JSON 给全部列
_COLUMNS = {
    "orders": ["order_date", "order_id", "customer_nickname", "latest_status", "system_order_type", "amount", "quantity"],
    "customers": ["customer_nickname", "order_count", "total_amount", "sample_count", "proof_count", "bulk_count", "last_order_at"],
    "leads": ["customer_nickname", "lead_no", "current_stage", "opened_at", "last_order_at", "closed_at", "closed_by", "owner"],
}


@click.command("show")
@click.argument("table", type=click.Choice(list(_COLUMNS)))
@click.option("--customer", help="Only customers whose nickname contains this.")
@click.option(
    "--day", type=click.DateTime(["%Y-%m-%d"]), help="Only rows of this business day (of the last order, for customers and leads)."
)
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=20, show_default=True, help="At most this many rows, newest first.")
@click.option("--format", "how", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@with_stack
def show_command(table: str, customer: str | None, day: datetime | None, limit: int, how: Format) -> None:
    """Show rows of orders, customers or leads, newest first."""
    from etl_assets.core.database_sync import get_engine
    from etl_assets.core.settings import get_settings
    from etl_assets.services.reports import show_rows

    settings = get_settings()
    wanted: date | None = day.date() if day else None
    with translated_errors(), get_engine().connect() as connection:
        rows: list[dict[str, Any]] = [
            dict(row) for row in show_rows(connection, settings, table, customer=customer, day=wanted, limit=limit)
        ]
    columns = _COLUMNS[table] if how == "table" or not rows else list(rows[0])
    print_rows(rows, columns, how)
