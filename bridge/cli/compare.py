"""etl compare：两个 schema 的结果逐列比较。"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import DAY, Decorator, console, with_stack
from bridge.cli.output import cell, say_json
from bridge.errors import BridgeError
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import EtlError
from etl_assets.core.settings import get_settings

if TYPE_CHECKING:
    from etl_assets.comparison.comparing import Comparison, ComparisonRequest, TableComparison


class NotComparedError(BridgeError):
    """没有比成：退出码是 2，1 只表示有差异。"""


def _parse_tolerance(_ctx: click.Context, _option: click.Parameter, value: str) -> Decimal:
    """不小于 0 的十进制数：浮点数的 0.01 不是 0.01，NaN 会让什么都算相同。"""
    try:
        number = Decimal(value)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 0:
        raise click.BadParameter(f"{value!r} is not a number of 0 or more, for example 0.01")
    return number


def _tolerance_option(flag: str, name: str, help_text: str) -> Decorator:
    return click.option(
        flag, name, callback=_parse_tolerance, metavar="NUMBER", default="0", show_default=True, help=help_text
    )


# 没有点名的参数（how）是 ComparisonRequest 的字段，选项与它们同名
@click.command("compare")
@click.option("--left", required=True, metavar="SCHEMA", help="Schema of the one result, the old one say.")
@click.option("--right", required=True, metavar="SCHEMA", help="Schema of the other result.")
@click.option(
    "--table", "tables", type=click.Choice(list(descriptions())), multiple=True, help="Only this table; repeatable."
)
@click.option(
    "--since",
    type=DAY,
    help="Only orders of this business day or later, customers and leads whose last order is, and so on.",
)
@_tolerance_option("--tolerance", "tolerance", "Amounts that differ by no more are the same.")
@_tolerance_option("--time-tolerance", "time_tolerance_seconds", "Times that differ by no more seconds are the same.")
@click.option("--ignore", "ignored", metavar="COLUMN", multiple=True, help="Do not compare this column; repeatable.")
@click.option(
    "--samples",
    type=click.IntRange(0, 10_000),
    default=10,
    show_default=True,
    help="Show at most this many keys of each kind of difference.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--html",
    "html_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write a report to this file.",
)
@with_stack
def compare_command(
    tables: tuple[str, ...], since: datetime | None, as_json: bool, html_file: Path | None, **how: Any
) -> None:
    """Compare the results in two schemas, column by column: exit 0 when equal, 1 when they differ, 2 when they cannot be compared.

    Rows are found by their business key (orders by shop and order id, customers by customer_key, leads by
    customer_key and lead_no), so another id is a difference of a column, not of the row. created_at and
    updated_at are not compared. A schema may hold views instead of tables.
    """
    from bridge.operations.compare_report import describe, render_html
    from etl_assets.comparison.comparing import ComparisonRequest, compare_schemas

    chosen = tuple(dict.fromkeys(tables)) or tuple(descriptions())
    request = ComparisonRequest(tables=chosen, since=since.date() if since else None, **how)
    _check_usage(request, html_file)
    try:
        comparison = compare_schemas(get_engine(), get_settings(), request)
    except EtlError as error:
        raise NotComparedError(str(error)) from error
    if html_file is not None:
        _write(html_file, render_html(comparison))
    if as_json:
        say_json(describe(comparison))
    else:
        _print(comparison)
    sys.exit(ExitCode.DONE if comparison.equal else ExitCode.FAILED)


def _check_usage(request: ComparisonRequest, html_file: Path | None) -> None:
    """比之前就说：白比几分钟以后才发现写不了报告，太晚。"""
    from etl_assets.comparison.sides import compared_columns

    if request.left == request.right:
        raise click.BadParameter(f"{request.left!r} is also --left: name two schemas", param_hint="--right")
    columns = dict.fromkeys(column.name for table in request.tables for column in compared_columns(table))
    for column in request.ignored:
        if column not in columns:
            raise click.BadParameter(
                f"{column!r} is not compared anyway; choose from {', '.join(columns)}", param_hint="--ignore"
            )
    if html_file is not None and not html_file.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {str(html_file.parent)!r} does not exist", param_hint="--html")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NotComparedError(f"cannot write {file}: {error.strerror}; choose another --html FILE") from error


def _print(comparison: Comparison) -> None:
    from bridge.operations.compare_report import show_share, summarize

    out = console()
    request = comparison.request
    summary = _table("table", "rows left", "rows right", "missing", "extra", "differing", "equal", numbers=range(1, 7))
    columns = _table("table", "column", "differing values", "largest difference (times in s)", numbers=(2, 3))
    for table in comparison.tables:
        numbers = (table.rows_left, table.rows_right, table.missing, table.extra, table.differing)
        _add(summary, table.table, *(f"{number:,}" for number in numbers), show_share(table))
        for column in table.columns:
            if column.differing:
                largest = "" if column.largest_difference is None else str(column.largest_difference)
                _add(columns, table.table, column.column, f"{column.differing:,}", largest)
    out.print(cell(f"left: {request.left}; right: {request.right}; missing: only left; extra: only right"))
    out.print(summary)
    if columns.rows:
        out.print(columns)
    for table in comparison.tables:
        _print_samples(out, table)
    out.print(cell(summarize(comparison)))


def _print_samples(out: Console, table: TableComparison) -> None:
    from bridge.operations.compare_report import show_pair, show_value

    samples = table.samples
    rows = [
        *(("missing", key, "", "", "") for key in samples.missing),
        *(("extra", key, "", "", "") for key in samples.extra),
        *(
            ("differs", sample.key, sample.column, *show_pair(sample.left, sample.right))
            for sample in samples.differing
        ),
    ]
    if rows:
        shown = _table(table.table, *rows[0][1], "column", "left", "right")
        for kind, key, *values in rows:
            _add(shown, kind, *(show_value(part) for part in key.values()), *values)
        out.print(shown)


def _table(*headers: str, numbers: Iterable[int] = ()) -> Table:
    table = Table()
    for position, header in enumerate(headers):
        table.add_column(cell(header), justify="right" if position in numbers else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """数据里的 [red] 与 :smile: 不是标记。"""
    table.add_row(*map(cell, cells))
