"""etl grants：PostgreSQL 的角色与权限，印成 SQL。"""

from __future__ import annotations

import click

from bridge.cli.output import say
from bridge.settings import get_bridge_settings
from etl_assets.core.settings import get_settings


@click.command("grants")
@click.option("--prefix", default="dayline", show_default=True, help="How the names of the roles begin.")
def grants_command(prefix: str) -> None:
    """Print the SQL that gives each role what it needs in PostgreSQL; nothing is executed.

    Run it as the owner of the tables, after `etl init-db` and after each upgrade: `etl grants | psql "$URL"`. PREFIX_etl is for the
    listener, the workers, the UI and the daemon, PREFIX_importer for what writes raw_orders and import_tasks, PREFIX_reader reads,
    PREFIX_operator is for the commands. They cannot log in: make users of your own members of them.
    """
    from bridge.roles.database import grants
    from bridge.stack.dagster_home import DAGSTER_SCHEMA

    dagster_schema = get_bridge_settings().own_name(DAGSTER_SCHEMA)
    say(grants(prefix, get_settings().target_schema, dagster_schema).rstrip("\n"))
