"""etl demo：一条命令看完整条流程。"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bridge.cli.abort import on_abort
from bridge.cli.events import wait_until_done
from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import print_rows
from bridge.cli.output import say
from bridge.settings import LOGIN_VARIABLES, BridgeSettings, get_bridge_settings
from etl_assets.core.database_sync import get_engine
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import EtlSettings, get_settings, read_settings
from etl_assets.reports.progress import import_progress

if TYPE_CHECKING:
    from bridge.imports.rules.profile import Profile

_TIMEOUT_SECONDS = 300.0
_MAX_DIFFERENCES_SHOWN = 20


@click.command("demo")
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your file instead of the sample data.",
)
@click.option("--profile", help="Profile of the file: a path, or a name of `etl profiles`.")
@click.option("--keep", is_flag=True, help="Keep the stack up afterwards, until Ctrl-C.")
def demo_command(file: Path | None, profile: str | None, keep: bool) -> None:
    """Start a stack of its own, import sample data in four batches, show the result, check it, stop.

    Exit 0 when all tables equal the row-by-row reference (in a checkout; a wheel does not have it); nothing is left running.
    """
    from bridge.imports.rules.profile import load_profile
    from bridge.stack.local import Stack, wait_for_stop_signal

    configure_logging("demo", level="WARNING")
    for name in ("ETL_DATABASE_URL", "ETL_DATABASE_URL_FILE", "ETL_NATS_URL", "ETL_NATS_URL_FILE", *LOGIN_VARIABLES):
        os.environ[name] = ""  # 演示只动自己的栈
    loaded = load_profile(profile) if profile else None
    with tempfile.TemporaryDirectory(prefix="etl-demo-") as folder:
        stack = Stack(
            Path(folder) / "state",
            settings=read_settings(EtlSettings).model_copy(update={"database_url": ""}),
            bridge_settings=read_settings(BridgeSettings).model_copy(update={"nats_url": ""}),
        )
        _remove_after_us(folder)
        on_abort(stack.kill)
        say("Starting PostgreSQL, NATS, Dagster, the listener and two workers ...")
        with stack as addresses:
            os.environ.update(addresses.environment())
            say(f"The stack is up: {addresses.ui_url}")
            matches = _run(Path(folder), file, loaded)
            if keep:
                say(
                    f'Look around: {addresses.ui_url}   eval "$(etl env --state-dir {folder}/state)"   Ctrl-C stops it.'
                )
                wait_for_stop_signal()
    sys.exit(ExitCode.DONE if matches else ExitCode.FAILED)


def _remove_after_us(folder: str) -> None:
    """另一个进程等我们的管道断了就删：打断的、kill -9 的也不留下文件。服务器随我们死，要一会儿。"""
    reading, _ours = os.pipe()  # 我们这一头只随进程关上
    command = ["/bin/sh", "-c", 'cat; sleep 1; rm -rf -- "$0"', folder]
    subprocess.Popen(
        command, stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(reading)


def _run(folder: Path, file: Path | None, profile: Profile | None) -> bool:
    """导入、等待、汇总、核对；返回是否与参照一致。"""
    from bridge.demo.dataset import write_batches
    from bridge.demo.flow import import_and_publish, map_order_types, summarize
    from bridge.demo.reference import find_differences, has_reference
    from bridge.events.history import read_completions

    engine, settings = get_engine(), get_settings()
    if file is None:
        map_order_types(engine)
    import_ids = {}
    for position, path in enumerate([file] if file else write_batches(folder)):
        # 样例里有一行的店没人认识：只在第一批建店，那一行在后面的批次里
        report = import_and_publish(engine, settings, path, profile=profile, create_shops=position == 0)
        say(f"Imported {path.name}: {report.rows:,} rows in {report.seconds:.2f} s")
        if report.import_id is not None:
            import_ids[path.name] = report.import_id
    for name, import_id in import_ids.items():
        progress = partial(import_progress, settings=settings, import_id=import_id)
        if wait_until_done(name, progress, timeout_seconds=_TIMEOUT_SECONDS):
            say("see `etl status` and the logs (run with --keep)", err=True)
            return False
    assets, lead_stages = summarize(engine, settings, asyncio.run(read_completions(get_bridge_settings())))
    print_rows(assets, ["asset", "rows", "rejected", "runs", "days", "seconds"], "table", title="Assets")
    print_rows(lead_stages, ["stage", "leads"], "table", title="Lead stages")
    if not has_reference():
        say("All imports are in the tables. (A checkout also compares them with a row-by-row reference.)")
        return True
    differences = find_differences(engine, settings)
    for difference in differences[:_MAX_DIFFERENCES_SHOWN]:
        say(f"difference: {difference}", err=True)
    say(
        "All tables equal the row-by-row reference."
        if not differences
        else f"{len(differences)} differences from the reference."
    )
    return not differences
