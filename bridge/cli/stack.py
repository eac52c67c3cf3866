"""etl up、etl env、etl init-db。"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from bridge.cli.abort import say_on_abort
from bridge.cli.options import start_metrics_if_wanted, with_stack
from bridge.cli.output import say, say_json
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir, read_addresses
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import get_settings

_STATE_DIR = click.Path(file_okay=False, path_type=Path)


@click.command("up")
@click.option(
    "--state-dir",
    type=_STATE_DIR,
    help="Folder for data, logs and addresses [default: ETL_STATE_DIR or ~/.local/state/dayline].",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the UI [default: 3000, or a free one].")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Number of warm worker processes."
)
@click.option("--read-only-ui", is_flag=True, help="The UI only shows [default: ETL_UI_READ_ONLY].")
def up_command(state_dir: Path | None, port: int | None, workers: int, read_only_ui: bool) -> None:
    """Start the stack in the foreground: PostgreSQL, NATS, Dagster UI, listener, workers.

    ETL_DATABASE_URL and ETL_NATS_URL replace the embedded servers. Ctrl-C stops all of it.
    """
    from bridge.stack.local import Stack

    configure_logging("stack")
    if read_only_ui:
        os.environ["ETL_UI_READ_ONLY"] = "1"
    folder = state_dir or default_state_dir()
    start_metrics_if_wanted(folder, records=False)  # 在子进程之前：它闲着，由它给出
    stack = Stack(
        folder,
        settings=get_settings(),
        bridge_settings=get_bridge_settings(),
        port=port,
        workers=workers,
    )
    stack.run(lambda addresses: say(f"ready: {addresses.ui_url}"))


@click.command("env")
@click.option(
    "--state-dir", type=_STATE_DIR, help="State folder of the stack [default: ETL_STATE_DIR or ~/.local/state/dayline]."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of export lines.")
def env_command(state_dir: Path | None, as_json: bool) -> None:
    """Print the addresses of the stack that is up, passwords included: eval "$(etl env)"."""
    folder = state_dir or default_state_dir()
    addresses = read_addresses(folder)
    if addresses is None:
        raise SettingsError(f"no stack is up in {folder}: start one with `etl up`")
    environment = addresses.environment()
    if as_json:
        say_json(environment)
    else:
        for name, value in environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")


@click.command("init-db")
@click.option(
    "--create-indexes",
    is_flag=True,
    help="Build the indexes that are missing on the application's tables, one after the other.",
)
@with_stack
def init_db_command(create_indexes: bool) -> None:
    """Create or upgrade the schema; tables of the application that exist already are left alone.

    Also creates the database that DAGSTER_POSTGRES_URL names, when that is set and not there, and the result tables in ETL_TARGET_SCHEMA
    when it has none, takes in the orders that another system wrote there, and writes down which assets this code has, and what depends on
    what.

    The ETL looks up rows in the application's tables. Where no index serves a lookup, every event and run reads the whole table: the
    statements that mend this are printed, and --create-indexes runs them. They are CREATE INDEX CONCURRENTLY: nobody is locked out. An
    INVALID index that an interrupted build has left is dropped and built again. Exit 1 when some are still missing, because the role does
    not own the table, for instance: then the statements for its owner are printed.
    """
    from bridge.roles.database import renew_rights
    from bridge.stack.dagster_home import DAGSTER_SCHEMA, ensure_dagster_database
    from etl_assets.definitions import graph
    from etl_assets.ledger.graph import write_graph
    from etl_assets.migrations.upgrade import upgrade_database
    from etl_assets.reports import index_building
    from etl_assets.reports.lookups import find_index_work
    from etl_assets.reports.readiness import assert_rights_of_service, assert_writable
    from etl_assets.services.target_schema import prepare_target

    transact(get_engine(), assert_writable)
    created = upgrade_database(get_engine())
    say(
        "created the application tables and schema etl"
        if created
        else "schema etl is up to date; the application tables were left alone"
    )
    if (dagster_url := os.environ.get("DAGSTER_POSTGRES_URL")) and ensure_dagster_database(dagster_url):
        say("created the database of DAGSTER_POSTGRES_URL; `dagster instance migrate` creates its tables")
    target = prepare_target(get_engine(), get_settings())
    dagster_schema = get_bridge_settings().own_name(DAGSTER_SCHEMA)
    renew_rights(get_engine(), target=get_settings().target_schema, dagster_schema=dagster_schema)
    transact(get_engine(), assert_rights_of_service, get_settings().target_schema)
    if transact(get_engine(), write_graph, get_settings().target_schema, graph):
        say(f"wrote down the assets: {', '.join(graph.names)}")
    if target.created_tables:
        *others, last = target.created_tables
        say(f"created {', '.join(others) + ' and ' if others else ''}{last} in schema {get_settings().target_schema}")
    if target.adopted_orders:
        say(
            f"indexed {target.adopted_orders} orders that another system wrote to schema {get_settings().target_schema}"
        )
    if create_indexes:
        say_on_abort(f"aborted: {index_building.AGAIN}")
        built = index_building.create_indexes(get_engine(), get_settings(), say)
        say(f"built {built} indexes" if built else "no index is missing")
        return
    missing = transact(get_engine(), find_index_work, get_settings())
    for work in missing:
        say(work.problem if work.is_buildable else work.says)
        for statement in work.statements if work.is_buildable else ():
            say(f"  {statement};")
    if any(work.is_buildable for work in missing):
        say(
            "run these one by one as the owner of the tables, or run `etl init-db --create-indexes`; neither locks anybody out"
        )
