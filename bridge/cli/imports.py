"""etl import、etl imports。"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from bridge.cli.options import Format, print_rows, transaction, with_stack
from bridge.cli.output import cell, say, say_json
from bridge.settings import get_bridge_settings
from etl_assets.core.database_sync import get_engine
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import get_settings

_FULL_SECONDS = 1.0
_IMPORTS_COLUMNS = ["import_id", "source_name", "status", "completed_at", "raw", "loaded", "superseded", "rejected", "waiting"]


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--map", "pairs", multiple=True, metavar="OURS=THEIRS", help="Take column OURS of raw_orders from the file's column THEIRS.")
@click.option("--profile", help="TOML profile: a path, or the name of a shipped one (cdnow, online_retail).")
@click.option("--shop", help="The shop of every row.")
@click.option("--encoding", help="Encoding of the text, such as gb18030, big5, cp932, cp1252, utf-16.")
@click.option("--separator", help="What separates the fields: one character, or `tab`.")
@click.option("--quotes/--no-quotes", default=None, help="Whether quotes around a field are no part of it.")
@click.option("--header-row", type=click.IntRange(min=1), help="The row of the file that holds the names of the columns.")
@click.option("--sheet", help="The sheet of a workbook.")
@click.option("--keep-totals", is_flag=True, default=None, help="Rows such as 合计 or Total are orders, too.")
@click.option("--create-shops", is_flag=True, help="Add shops that shop_configs does not know.")
@click.option("--skip-bad-rows", is_flag=True, help="Import the rest and write the bad rows beside the file.")
@click.option("--dry-run", is_flag=True, help="Read and check the file, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@with_stack
def import_command(
    file: Path,
    pairs: tuple[str, ...],
    profile: str | None,
    shop: str | None,
    encoding: str | None,
    separator: str | None,
    quotes: bool | None,
    header_row: int | None,
    sheet: str | None,
    keep_totals: bool | None,
    create_shops: bool,
    skip_bad_rows: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Import a table of text (CSV, TSV …) or a workbook into raw_orders, then publish DATA_IMPORT_COMPLETED.

    What the file is, is found from its content and said on stderr; the options and the profile's [file] decide otherwise.
    All or nothing: one bad row and nothing is imported, unless --skip-bad-rows.
    """
    from bridge.events.subjects import DATA_IMPORT_COMPLETED
    from bridge.imports.loading import import_file
    from bridge.imports.profile import FileFormat, load_profile, override_format

    configure_logging("import", level="WARNING")
    settings = get_settings()
    mapping = _parse_pairs(pairs)
    loaded = load_profile(profile) if profile else None
    given = {
        "encoding": encoding,
        "separator": "\t" if separator in ("tab", "\\t") else separator,
        "quotes": quotes,
        "header_row": header_row,
        "sheet": sheet,
        "keep_totals": keep_totals,
    }
    shape = override_format(loaded.file if loaded else FileFormat(), given)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(cell(file.name).plain, total=None)
        report = import_file(
            get_engine(),
            file,
            settings=settings,
            profile=loaded,
            file=shape,
            shop=shop,
            mapping=mapping,
            create_shops=create_shops,
            skip_bad_rows=skip_bad_rows,
            dry_run=dry_run,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if report.import_id is not None:
        try:
            _announce(report.import_id)
        except (Exception, KeyboardInterrupt):
            say(
                f"import {report.import_id} is in raw_orders but was not announced; once NATS is back: "
                f"etl publish {DATA_IMPORT_COMPLETED} '{json.dumps({'status': 'completed', 'import_id': str(report.import_id)})}'",
                err=True,
            )
            raise
    if as_json:
        say_json(asdict(report))
        return
    for name, rows in report.unknown_shops.items():
        say(f"warning: shop {name!r} is not in shop_configs, its {rows:,} rows will be rejected (--create-shops adds it)", err=True)
    first_day = report.first_ordered_at and report.first_ordered_at.astimezone(settings.zone).date()
    if first_day and first_day < settings.partitions_start:
        say(
            f"warning: orders before {settings.partitions_start} are outside the partitions and will be rejected; "
            f"the file begins on {first_day}: set ETL_PARTITIONS_START and restart the stack to load them",
            err=True,
        )
    say(f"read as {report.read_as}", err=True)
    if report.created_shops:
        say(f"added shops: {', '.join(report.created_shops)}", err=True)
    if report.skipped_rows:
        say(f"skipped {report.skipped_rows:,} bad rows" + (f", see {report.rejected_file}" if report.rejected_file else ""), err=True)
    say(f"{report.rows:,} orders from {report.source_rows:,} rows of {file.name} in {report.seconds:.2f} s", err=True)
    say(str(report.import_id) if report.import_id else "dry run: nothing was written")


def _announce(import_id: UUID) -> None:
    """发布事件；流满了就等，并说为什么等。"""
    from bridge.errors import StreamFullError
    from bridge.events.envelope import DataImportCompleted
    from bridge.events.publish import publish_event
    from bridge.events.subjects import DATA_IMPORT_COMPLETED

    event, waiting = DataImportCompleted(import_id=import_id), False
    while True:
        try:
            asyncio.run(publish_event(DATA_IMPORT_COMPLETED, event, settings=get_bridge_settings()))
        except StreamFullError as error:
            if not waiting:
                say(f"import {import_id} is in raw_orders; waiting to announce it: {error}", err=True)
            waiting = True
            time.sleep(_FULL_SECONDS)
        else:
            return


@click.command("imports")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="At most this many imports, newest first.")
@click.option("--format", "how", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@with_stack
def imports_command(limit: int, how: Format) -> None:
    """List the imports: file, time, and how many rows were loaded, superseded, rejected or are still waiting."""
    from etl_assets.reports.reports import import_accounting

    with transaction() as connection:
        rows = [dict(row) for row in import_accounting(connection, get_settings(), limit=limit)]
    print_rows(rows, _IMPORTS_COLUMNS, how)


def _parse_pairs(pairs: tuple[str, ...]) -> Mapping[str, str]:
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is not OURS=THEIRS, for example --map amount=实付金额", param_hint="--map")
    return {ours.strip(): theirs.strip() for ours, _, theirs in (pair.partition("=") for pair in pairs)}
