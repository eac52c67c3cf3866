"""退出码：文档里的表与代码一致。"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from bridge import cli
from bridge.cli.abort import STOP_SIGNALS
from bridge.cli.exit_codes import ExitCode

DOCS = Path(__file__).parents[2] / "docs"
NOWHERE = {"ETL_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere", "ETL_NATS_URL": "nats://127.0.0.1:1"}
"""没有服务器在听的端口。"""


@pytest.mark.parametrize("page", ["shell.md", "shell.zh-CN.md"])
def test_table_lists_the_codes_of_the_code(page: str) -> None:
    rows = re.findall(r"^\| `(\d+)` \|", (DOCS / page).read_text(), re.MULTILINE)
    assert [int(code) for code in rows] == sorted([*ExitCode, *(128 + number for number in STOP_SIGNALS)])


@pytest.mark.parametrize("path", sorted(Path(cli.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_command_ends_with_a_named_code(path: Path) -> None:
    """数字写在一处，表才不会漏。"""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    ends = [call for call in calls if ast.unparse(call.func) in ("sys.exit", "ctx.exit", "context.exit")]
    assert [ast.unparse(end) for end in ends if any(isinstance(node, ast.Constant) for node in ast.walk(end))] == []


def test_server_that_is_away_gives_no_answer() -> None:
    command = etl("wait", "--import-id", str(uuid4()), "--timeout", "0")
    assert command.returncode == ExitCode.NO_ANSWER
    assert "cannot reach the PostgreSQL" in command.stderr


def test_wrong_usage_has_no_answer() -> None:
    command = etl("wait")
    assert command.returncode == ExitCode.NO_ANSWER
    assert "Missing option '--import-id'" in command.stderr


def test_a_range_the_wrong_way_round_is_wrong_usage() -> None:
    command = etl("backfill", "--from", "2026-03-05", "--to", "2026-03-01")
    assert command.returncode == ExitCode.NO_ANSWER
    assert "--from 2026-03-05 is after --to 2026-03-01" in command.stderr


def test_a_lane_that_is_none_is_told_which_there_are() -> None:
    command = etl("worker", "--lanes", "event, fast")
    assert command.returncode == ExitCode.NO_ANSWER
    assert (
        "Invalid value for '--lanes': 'fast' is no lane; these are: interactive, small, event, bulk" in command.stderr
    )


def test_one_day_is_not_watched() -> None:
    command = etl("status", "--day", "2026-03-05", "--watch")
    assert command.returncode == ExitCode.NO_ANSWER
    assert "leave out --day or --watch" in command.stderr


@pytest.mark.parametrize("arguments", [("why", "day", "2026-13-45"), ("status", "--day", "today")])
def test_a_day_that_is_none_is_told_how_days_are_written(arguments: tuple[str, ...]) -> None:
    command = etl(*arguments)
    assert command.returncode == ExitCode.NO_ANSWER
    assert f"'{arguments[-1]}' is not a day, write it as 2026-03-20" in command.stderr
    assert "%Y" not in command.stderr


def test_a_full_disk_below_the_output_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        command = subprocess.run(
            [sys.executable, "-m", "bridge.cli.main", "completion", "bash"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert command.returncode == ExitCode.FAILED
    assert command.stderr == (
        "error: No space left on device: what was printed is cut off; free some space, then try again\n"
    )


def etl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridge.cli.main", *arguments]
    return subprocess.run(command, env=os.environ | NOWHERE, capture_output=True, text=True, check=False)
