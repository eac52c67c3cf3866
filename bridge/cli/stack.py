"""etl up、etl env、etl init-db。"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from bridge.cli.options import with_stack
from bridge.cli.output import say, say_json
from bridge.stack.addresses import StackAddresses, default_state_dir, read_addresses
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import configure_logging

_STATE_DIR = click.Path(file_okay=False, path_type=Path)


@click.command("up")
@click.option(
    "--state-dir", type=_STATE_DIR, help="Folder for data, logs and addresses [default: ETL_STATE_DIR or ~/.local/state/dayline]."
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the UI [default: 3000, or a free one].")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Number of warm worker processes.")
def up_command(state_dir: Path | None, port: int | None, workers: int) -> None:
    """Start the stack in the foreground: PostgreSQL, NATS, Dagster UI, listener, workers.

    ETL_DATABASE_URL and ETL_NATS_URL replace the embedded servers. Ctrl-C stops all of it.
    """
    from bridge.settings import get_bridge_settings
    from bridge.stack.local import Stack
    from etl_assets.core.settings import get_settings

    configure_logging("stack")
    stack = Stack(
        state_dir or default_state_dir(), settings=get_settings(), bridge_settings=get_bridge_settings(), port=port, workers=workers
    )
    stack.run(lambda addresses: say(f"ready: {addresses.ui_url}"))


@click.command("env")
@click.option("--state-dir", type=_STATE_DIR, help="State folder of the stack [default: ETL_STATE_DIR or ~/.local/state/dayline].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of export lines.")
def env_command(state_dir: Path | None, as_json: bool) -> None:
    """Print the addresses of the stack that is up, passwords included: eval "$(etl env)"."""
    environment = _running(state_dir or default_state_dir()).environment()
    if as_json:
        say_json(environment)
    else:
        for name, value in environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")


@click.command("init-db")
@with_stack
def init_db_command() -> None:
    """Create or upgrade the schema; tables of the application that exist already are left alone.

    Also creates the result tables in ETL_TARGET_SCHEMA when it has none, and indexes the orders that another system wrote there.
    """
    from etl_assets.core.database_sync import get_engine
    from etl_assets.core.settings import get_settings
    from etl_assets.migrations.upgrade import upgrade_database
    from etl_assets.services.target_schema import prepare_target

    created = upgrade_database(get_engine())
    say("created the application tables and schema etl" if created else "schema etl is up to date; the application tables were left alone")
    target = prepare_target(get_engine(), get_settings())
    if target.created_tables:
        say(f"created orders, customers and business_leads in schema {get_settings().target_schema}")
    if target.adopted_orders:
        say(f"indexed {target.adopted_orders} orders that another system wrote to schema {get_settings().target_schema}")


def _running(state_dir: Path) -> StackAddresses:
    addresses = read_addresses(state_dir)
    if addresses is None:
        raise SettingsError(f"no stack is up in {state_dir}: start one with `etl up`")
    return addresses
