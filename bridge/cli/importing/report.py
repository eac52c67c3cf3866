"""一次导入的结果，给人看的样子：读法、写法、要留心的，各一句；试运行还有预览。"""

from __future__ import annotations

from collections.abc import Iterator

from bridge.cli.importing.figures import say_figures
from bridge.cli.options import print_rows
from bridge.cli.output import say
from bridge.imports.preview import SHOWN_ROWS, Preview
from bridge.imports.reading import ImportReport
from bridge.imports.rules.errors import shorten
from etl_assets.core.settings import EtlSettings

_CELL_CHARACTERS = 60


def say_report(report: ImportReport, settings: EtlSettings) -> None:
    """标准输出上是导入的 id，试运行时是预览；其余在标准错误。"""
    for reading in report.conventions:
        because = f"row {reading.because.row}: {shorten(reading.because.value)}" if reading.because else "as asked for"
        say(f"column {reading.column!r}: {reading.convention} ({because})", err=True)
    for warning in _warnings(report, settings):
        say(f"warning: {warning}", err=True)
    say(f"read as {report.read_as}", err=True)
    if report.profile_chosen:
        say(f"profile {report.profile}, chosen by the headers (--profile none reads the file without it)", err=True)
    say_figures(report, settings)
    if report.created_shops:
        say(f"added shops: {', '.join(report.created_shops)}", err=True)
    if report.skipped_rows:
        say(
            f"skipped {report.skipped_rows:,} bad rows"
            + (f", see {report.rejected_file}" if report.rejected_file else ""),
            err=True,
        )
    what = f"versions of {report.orders:,} orders" if report.repeated_orders else "orders"
    say(f"{report.rows:,} {what} from {report.source_rows:,} rows of {report.file} in {report.seconds:.2f} s", err=True)
    if report.preview is not None:
        _print_preview(report.preview, settings)
    say(str(report.import_id) if report.import_id else "dry run: nothing was written")


def _warnings(report: ImportReport, settings: EtlSettings) -> Iterator[str]:
    if report.imported_before:
        said = report.imported_before.describe(settings)
        yield f"imported again: {said}" if report.import_id else f"{said}; without --again it is refused"
    if report.turned_back:
        yield report.turned_back.describe(settings, is_done=report.import_id is not None)
    for name, rows in report.unknown_shops.items():
        yield f"shop {name!r} is not in shop_configs, its {rows:,} rows will be rejected (--create-shops adds it)"
    first_day = report.first_ordered_at and report.first_ordered_at.astimezone(settings.zone).date()
    if first_day and first_day < settings.partitions_start:
        yield (
            f"orders before {settings.partitions_start} are outside the partitions and will be rejected; "
            f"the file begins on {first_day}: set ETL_PARTITIONS_START and restart the stack to load them"
        )
    last_day = report.last_ordered_at and report.last_ordered_at.astimezone(settings.zone).date()
    if last_day and last_day > settings.today():
        yield f"orders after today are outside the partitions and will be rejected; the file ends on {last_day}"
    for rule, rows in report.rejected.items():
        yield f"{rows:,} rows will be rejected: {rule}"


def _print_preview(preview: Preview, settings: EtlSettings) -> None:
    columns = list(preview.rows[0]) if preview.rows else []
    rows = [{name: _cut(value) for name, value in row.items()} for row in preview.rows]
    title = f"the first {min(len(rows), SHOWN_ROWS)} rows as they will be stored, times in {settings.timezone}"
    print_rows(rows, columns, "table", title=title)
    mapping = [{"column": each.name, "from": _cut(each.source), "because": each.because} for each in preview.columns]
    print_rows(mapping, ["column", "from", "because"], "table", title="where the columns come from")
    if preview.unused_columns:
        say(f"columns of the file that are not used: {', '.join(preview.unused_columns)}")


def _cut(value: object) -> object:
    return f"{value[:_CELL_CHARACTERS]}…" if isinstance(value, str) and len(value) > _CELL_CHARACTERS else value
