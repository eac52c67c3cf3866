"""etl doctor：看一遍设置、服务器、表、台账与队列，说哪里不对、该怎么办。"""

from __future__ import annotations

import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.text import Text

from bridge.cli.options import with_stack
from bridge.cli.output import cell, say_json
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir
from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import get_settings

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as a JSON list.")
@with_stack
def doctor_command(as_json: bool) -> None:
    """Look at settings, servers, tables, ledger and queues; say what is wrong and what to do. Exit 1 when there is an error."""
    from bridge.operations.doctor import examine

    findings = []
    console = Console(soft_wrap=True)
    for finding in examine(get_engine(), get_settings(), get_bridge_settings(), state_dir=default_state_dir()):
        findings.append(finding)
        if not as_json:
            console.print(Text(f"{finding.state:8}", _STYLES[finding.state]), cell(f"{finding.check}: {finding.says}"))
    if as_json:
        say_json([asdict(finding) for finding in findings])
    sys.exit(1 if any(finding.state == "error" for finding in findings) else 0)
