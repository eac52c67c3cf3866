"""etl profiles：随包的导入配置，与给新文件起草一个。"""

from __future__ import annotations

from pathlib import Path

import click

from bridge.cli.options import Format, print_rows
from bridge.cli.output import say
from etl_assets.core.settings import get_settings

_COLUMNS = ["name", "platform", "headers", "source"]


@click.group("profiles", invoke_without_command=True)
@click.option("--format", "how", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
@click.pass_context
def profiles_command(ctx: click.Context, how: Format) -> None:
    """List the profiles that ship with the project, and the headers by which `etl import` chooses them."""
    if ctx.invoked_subcommand is not None:
        return
    from bridge.imports.rules.profile import as_names, shipped_platforms, shipped_profiles

    platforms = shipped_platforms()
    rows = [
        {
            "name": name,
            "platform": platforms[name].name if name in platforms else None,
            "headers": ", ".join(" or ".join(as_names(names)) for names in platforms[name].headers)
            if name in platforms
            else None,
            "source": platforms[name].source if name in platforms else None,
        }
        for name in shipped_profiles()
    ]
    print_rows(rows, _COLUMNS, how)


@profiles_command.command("show")
@click.argument("name")
def show_command(name: str) -> None:
    """Print the TOML of a shipped profile, to copy and change."""
    from bridge.imports.rules.errors import ProfileError
    from bridge.imports.rules.profile import shipped_profiles

    profiles = shipped_profiles()
    if name not in profiles:
        raise ProfileError(f"there is no shipped profile {name!r}: it is one of {', '.join(profiles)}")
    say(profiles[name].read_text(encoding="utf-8").rstrip("\n"))


@profiles_command.command("new")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--shop", help="The shop of every row.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it there instead of stdout.")
def new_command(file: Path, shop: str | None, output: Path | None) -> None:
    """Look at FILE and write a commented profile that imports it, or say what is missing (exit 2)."""
    from bridge.imports.drafting import draft_profile
    from bridge.imports.rules.errors import ProfileError

    if output is not None and output.exists():
        raise ProfileError(f"{output} exists already: choose another name")
    draft = draft_profile(file, shop=shop, time_zone=get_settings().timezone)
    if output is not None:
        try:
            output.write_text(draft.text, encoding="utf-8")
        except OSError as error:
            raise ProfileError(
                f"cannot write {output} ({error.strerror}): choose another path with --output"
            ) from error
        say(f"wrote {output}", err=True)
    else:
        say(draft.text.rstrip("\n"))
    if draft.problem is not None:
        raise ProfileError(f"the profile does not import {file.name} yet: {draft.problem}")
