"""按 Tab：命令、选项、选项的值。"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = f"#!{sys.executable}\nfrom bridge.cli.main import main\nmain()\n"
NAMES = ("etl", "dayline")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH，两个名字都在最前面：照安装时的样子写，环境里装着哪一版都一样。"""
    folder = tmp_path_factory.mktemp("bin")
    for name in NAMES:
        (folder / name).write_text(SCRIPT)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run(path: str, *command: str, **environment: str) -> str:
    program = shutil.which(command[0], path=path)
    assert program is not None
    environment = os.environ | {"PATH": path} | environment
    return subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, check=True).stdout


def complete(path: str, *words: str) -> list[str]:
    """shell 会怎样问，就怎样问；每一行是类型与词。"""
    name, *_, _ = words
    question = {
        f"_{name.upper()}_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return [line.partition(",")[2] for line in run(path, name, **question).splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["etl", "imp"], ["import", "imports"]),
        (["etl", "--v"], ["--version"]),
        (["etl", "status", "--w"], ["--watch"]),
        (["etl", "completion", ""], ["bash", "zsh", "fish"]),
        (["dayline", "st"], ["status"]),
    ],
    ids=" ".join,
)
def test_commands_options_and_values_are_completed(path: str, words: list[str], offered: list[str]) -> None:
    assert complete(path, *words) == offered


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_script_is_for_the_name_that_was_called(path: str, name: str, shell: str) -> None:
    assert f"_{name.upper()}_COMPLETE={shell}_complete" in run(path, name, "completion", shell)


@pytest.mark.parametrize("name", NAMES)
def test_bash_completes_once_the_script_was_evaluated(path: str, name: str) -> None:
    script = f"""
        eval "$({name} completion bash)"
        COMP_WORDS=({name} bac) COMP_CWORD=1
        "$(complete -p {name} | sed -E 's/.*-F ([^ ]+).*/\\1/')" {name}
        echo "${{COMPREPLY[@]}}"
    """
    assert run(path, "bash", "-c", script).split() == ["backfill"]
