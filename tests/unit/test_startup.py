"""命令行起得快：`etl --help` 与按 Tab 不导入它们用不到的东西。"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PRINT_MODULES = "import json, sys; print(json.dumps([*sys.modules]))"
RUN_AND_PRINT = f"""
import sys
from bridge.cli.main import main
sys.argv[:1] = ["etl"]
try:
    main()
except SystemExit as end:
    assert not end.code
{PRINT_MODULES}
"""
COMMAND_LINE = {
    *("bridge", "bridge.cli", "bridge.cli.abort", "bridge.cli.commands", "bridge.cli.exit_codes", "bridge.cli.main"),
    *("etl_assets", "etl_assets.core", "etl_assets.core.errors", "etl_assets.core.interruption"),
}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_click_and_nothing_heavier(arguments: list[str]) -> None:
    assert imported_by(RUN_AND_PRINT, *arguments) == COMMAND_LINE | {"click"}


def test_completing_a_command_imports_no_command() -> None:
    environment = {"_ETL_COMPLETE": "zsh_complete", "COMP_WORDS": "etl ", "COMP_CWORD": "1"}
    assert imported_by(RUN_AND_PRINT, **environment) == COMMAND_LINE | {"click"}


def test_what_runs_for_days_loads_nothing_that_it_needs_once() -> None:
    """`etl up` 起好以后只是看着：Alembic、Polars、NATS 的客户端不留在里面。"""
    loaded = {
        package_of(module) for module in modules_of(f"import bridge.cli.stack, bridge.stack.local; {PRINT_MODULES}")
    }
    assert not loaded & {"alembic", "aiohttp", "dagster", "nats", "polars", "taskiq"}


def imported_by(code: str, *arguments: str, **environment: str) -> set[str]:
    """本项目的模块与别人的包；标准库、解释器起来时就在的不算。"""
    own = {
        module
        for module in modules_of(code, *arguments, **environment)
        if package_of(module) in ("bridge", "etl_assets")
    }
    foreign = {package_of(module) for module in modules_of(code, *arguments, **environment) - modules_of(PRINT_MODULES)}
    return own | foreign - set(sys.stdlib_module_names) - {"bridge", "etl_assets"}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def modules_of(code: str, *arguments: str, **environment: str) -> set[str]:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))
