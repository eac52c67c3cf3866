"""etl import、etl imports。"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.abort import on_abort
from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import Format, print_rows, transaction, with_stack
from etl_assets.core.database_sync import get_engine
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import get_settings, is_time_zone

if TYPE_CHECKING:
    from bridge.imports.inputs import Input
    from bridge.imports.reading import ImportReport, Progress
    from bridge.imports.rules.numbers import DecimalMark
    from bridge.imports.rules.profile import LineRule
    from bridge.imports.rules.times import DateOrder

_IMPORTS_COLUMNS = [
    "import_id",
    "source_name",
    "status",
    "completed_at",
    "raw",
    "loaded",
    "superseded",
    "rejected",
    "waiting",
]


class _NamedPath(click.Path):
    """空的参数（没有值的 "$FILE"）不是当前的文件夹。"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value else self.fail("an empty name is no file", param, ctx)


@click.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=_NamedPath(path_type=Path, allow_dash=True))
@click.option(
    "--map",
    "pairs",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Take column OURS of raw_orders from the file's column THEIRS.",
)
@click.option("--profile", help="TOML profile: a path, a name of `etl profiles`, or none. [default: by the headers]")
@click.option("--shop", help="The shop of every row.")
@click.option("--encoding", help="Encoding of the text, such as gb18030, big5, cp932, cp1252, utf-16.")
@click.option("--separator", help="What separates the fields: one character, or `tab`.")
@click.option("--quotes/--no-quotes", default=None, help="Whether quotes around a field are no part of it.")
@click.option(
    "--header-row", type=click.IntRange(min=1), help="The row of the file that holds the names of the columns."
)
@click.option("--sheet", help="The sheet of a workbook.")
@click.option("--keep-totals", is_flag=True, default=None, help="Rows such as 合计 or Total are orders, too.")
@click.option("--decimal-comma", "decimal", flag_value="comma", help="Numbers have a decimal comma: 1.234,50.")
@click.option("--decimal-point", "decimal", flag_value="point", help="Numbers have a decimal point: 1,234.50.")
@click.option("--day-first", "date_order", flag_value="day-first", help="Dates such as 03/04/2026 are in April.")
@click.option("--month-first", "date_order", flag_value="month-first", help="Dates such as 03/04/2026 are in March.")
@click.option("--year-first", "date_order", flag_value="year-first", help="Dates such as 03/04/05 are in 2003.")
@click.option(
    "--timezone",
    metavar="ZONE",
    help="Zone of the file's times that name none, such as Europe/Berlin. [default: ETL_TIMEZONE]",
)
@click.option(
    "--lines-are-items", "lines", flag_value="items", help="Lines with the same order number are items of one order."
)
@click.option(
    "--newest-line-wins",
    "lines",
    flag_value="newest-wins",
    help="They are versions of it: the last one in the file is the order.",
)
@click.option("--create-shops", is_flag=True, help="Add shops that shop_configs does not know.")
@click.option("--skip-bad-rows", is_flag=True, help="Import the rest and write the bad rows beside the file.")
@click.option("--again", is_flag=True, help="Import a file whose content was imported before.")
@click.option("--name", help="What to call the file that comes from stdin. [default: stdin]")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read and check, show the first rows and where the columns come from, write nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@with_stack
def import_command(
    files: tuple[Path, ...],
    pairs: tuple[str, ...],
    profile: str | None,
    shop: str | None,
    encoding: str | None,
    separator: str | None,
    quotes: bool | None,
    header_row: int | None,
    sheet: str | None,
    keep_totals: bool | None,
    decimal: DecimalMark | None,
    date_order: DateOrder | None,
    timezone: str | None,
    lines: LineRule | None,
    create_shops: bool,
    skip_bad_rows: bool,
    again: bool,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Import tables of text (CSV, TSV …) or workbooks into raw_orders, then publish DATA_IMPORT_COMPLETED.

    FILE is a file, a folder (the tables in it, by name) or - for stdin. Each file is an import of its own.
    What the file is, is found from its content and said on stderr; the options and the profile's [file] decide otherwise.
    All or nothing: one bad row and nothing is imported, unless --skip-bad-rows.
    """
    from bridge.cli.importing.announcing import committing
    from bridge.cli.importing.files import FileImporter
    from bridge.imports.inputs import gather_inputs
    from bridge.imports.loading import import_file
    from bridge.imports.orders.conventions import GivenConventions
    from bridge.imports.rules.profile import NO_PROFILE_NAME, FileFormat, load_profile, override_format

    configure_logging("import", level="WARNING")
    settings = get_settings()
    mapping = _parse_pairs(pairs)
    if name is not None and (files.count(Path("-")) != 1 or Path(name).name != name):
        raise click.BadParameter("it names the file that comes from stdin (-), without a folder", param_hint="--name")
    loaded = load_profile(profile) if profile not in (None, NO_PROFILE_NAME) else None
    options = {
        "encoding": encoding,
        "separator": "\t" if separator in ("tab", "\\t") else separator,
        "quotes": quotes,
        "header_row": header_row,
        "sheet": sheet,
        "keep_totals": keep_totals,
        "lines": lines,
    }
    shape = override_format(loaded.file if loaded else FileFormat(), options)
    if timezone is not None and not is_time_zone(timezone):
        raise click.BadParameter(
            f"{timezone!r} is not an IANA time zone name such as Europe/Berlin", param_hint="--timezone"
        )
    given = GivenConventions(decimal=decimal, date_order=date_order, time_zone=timezone)
    engine = get_engine()

    def import_one(item: Input, on_progress: Progress) -> ImportReport:
        return import_file(
            engine,
            item.path,
            settings=settings,
            profile=loaded,
            choose_profile=profile is None,
            file=shape,
            shop=shop,
            given=given,
            mapping=mapping,
            create_shops=create_shops,
            skip_bad_rows=skip_bad_rows,
            rejected_folder=item.rejected_folder,
            again=again,
            dry_run=dry_run,
            on_progress=on_progress,
            committing=committing,
        )

    def remove_on_abort(spool: Path) -> None:
        on_abort(lambda: shutil.rmtree(spool, ignore_errors=True))

    with gather_inputs(files, stdin_name=name, on_spool=remove_on_abort) as inputs:
        is_fine = FileImporter(import_one, settings, as_json=as_json).run(inputs)
    if not is_fine:
        sys.exit(ExitCode.NO_ANSWER)


@click.command("imports")
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=20,
    show_default=True,
    help="At most this many imports, newest first.",
)
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
