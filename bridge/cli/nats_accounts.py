"""etl nats-accounts：各角色的 nkey 与 nats-server 的配置。"""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from bridge.cli.output import say
from bridge.settings import get_bridge_settings
from etl_assets.embedded.private_folder import create_private_folder, read_private_file, write_private_file

_CONFIG = "accounts.conf"


@click.command("nats-accounts")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", help="Address of the server, for the environment files [default: that of ETL_NATS_URL].")
def nats_accounts_command(folder: Path, url: str | None) -> None:
    """Write users of least privilege for NATS into FOLDER: one per role.

    accounts.conf is for nats-server (`include`), without secrets. ROLE.nk holds the secret of a role (mode 0600), ROLE.env the settings
    that use it. Secrets that are there already are kept: run it again after an upgrade, then `nats-server --signal reload`. To change one,
    remove its file first.
    """
    from bridge.jetstream.login import servers_without_login
    from bridge.roles.nats import nats_roles, server_config

    settings = get_bridge_settings()
    url = url or ",".join(servers_without_login(settings)) or "nats://127.0.0.1:4222"
    folder = folder.absolute()
    create_private_folder(folder)
    roles = nats_roles(settings)
    public_keys = {role.name: _public_key(folder / f"{role.name}.nk") for role in roles}
    for role in roles:
        values = {
            "ETL_NATS_URL": url,
            "ETL_NATS_NKEY": folder / f"{role.name}.nk",
            "ETL_NATS_INBOX_PREFIX": role.inbox_prefix,
        }
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        write_private_file(folder / f"{role.name}.env", text)
        say(f"{role.name}: {role.what}")
    write_private_file(folder / _CONFIG, server_config(roles, public_keys))
    say(f'wrote {folder / _CONFIG}: copy it beside nats-server.conf and add `include "{_CONFIG}"` there')


def _public_key(path: Path) -> str:
    """种子没有就生成；文件里只有它。"""
    import nkeys

    try:
        seed = read_private_file(path).strip()
    except FileNotFoundError:
        seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode()
        write_private_file(path, f"{seed}\n")
    return bytes(nkeys.from_seed(seed.encode()).public_key).decode()
