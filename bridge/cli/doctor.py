"""etl doctor：看一遍设置、服务器、表、台账与队列，说哪里不对、该怎么办。"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.text import Text

from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import ask, with_stack
from bridge.cli.output import cell, say, say_json
from bridge.operations.findings import Finding
from bridge.settings import get_bridge_settings
from bridge.stack.addresses import default_state_dir
from etl_assets.core.database_sync import get_engine
from etl_assets.core.errors import EtlError
from etl_assets.core.log import redact
from etl_assets.core.settings import get_settings

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as a JSON list.")
@click.option("--fix", is_flag=True, help="Mend what can be mended safely, after asking; then look again.")
@click.option("--yes", is_flag=True, help="With --fix: do not ask.")
@with_stack
def doctor_command(as_json: bool, fix: bool, yes: bool) -> None:
    """Look at settings, servers, tables, ledger and queues; say what is wrong and what to do. Exit 1 when there is an error.

    --fix builds missing indexes, creates missing streams and consumers and sets their settings right, and announces imports that nobody
    announced.
    """
    findings = _examine(shown=not as_json)
    if fix and _mend(findings, yes=yes):
        findings = _examine(shown=not as_json)
    if as_json:
        say_json([asdict(finding) for finding in findings])
    has_errors = any(finding.state == "error" for finding in findings)
    sys.exit(ExitCode.FAILED if has_errors else ExitCode.DONE)


def _examine(*, shown: bool) -> list[Finding]:
    from bridge.operations.doctor import examine

    findings = []
    console = Console(soft_wrap=True)
    for finding in examine(get_engine(), get_settings(), get_bridge_settings(), state_dir=default_state_dir()):
        findings.append(finding)
        if shown:
            console.print(Text(f"{finding.state:8}", _STYLES[finding.state]), cell(f"{finding.check}: {finding.says}"))
    return findings


def _mend(findings: Sequence[Finding], *, yes: bool) -> bool:
    """返回修了什么没有；修不成的说一声，接着修别的。"""
    from bridge.operations.mending import MENDINGS, Installation

    installation = Installation(get_engine(), get_settings(), get_bridge_settings())
    kinds = [kind for kind in MENDINGS if any(finding.fix == kind and finding.state != "ok" for finding in findings)]
    if not kinds:
        say("nothing here that --fix mends", err=True)
    mended = False
    for kind in kinds:
        if not yes and not ask(MENDINGS[kind].question):
            continue
        try:
            MENDINGS[kind].mend(installation, lambda said: say(said, err=True))
            mended = True
        except EtlError as error:
            say(f"not mended: {redact(str(error))}", err=True)
    return mended
