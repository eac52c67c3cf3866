"""etl completion：让 shell 用 Tab 补全命令与选项。"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options with Tab.

    bash, in ~/.bashrc: eval "$(etl completion bash)". zsh, in ~/.zshrc after compinit: eval "$(etl completion zsh)".
    fish: etl completion fish > ~/.config/fish/completions/etl.fish. It is for the name that you call: etl or dayline.
    """
    root = context.find_root()
    name = root.info_name or "etl"
    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"there is no completion for {shell}")
    click.echo(completion(root.command, {}, name, f"_{name.upper()}_COMPLETE").source())
