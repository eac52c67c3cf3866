"""run.py：找得到能用的 Python，找不到就说一句话。"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

RUN_PY = Path(__file__).parents[2] / "run.py"
BROKEN_SHIM = "#!/bin/sh\necho 'version not installed' >&2\nexit 127\n"
TOO_OLD = "#!/bin/sh\necho False\n"
WITHOUT_ENSUREPIP = "#!/bin/sh\necho True\nexit 1\n"
GOOD = "#!/bin/sh\necho True\n"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", RUN_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH 上唯一的文件夹；正在运行的 Python 太旧。"""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(add_python(tmp_path, "python3", TOO_OLD)))
    return tmp_path


def add_python(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)
    return path


def test_the_running_python_is_used_when_it_is_suitable(bootstrap: ModuleType) -> None:
    assert bootstrap.find_python() == sys.executable


def test_newest_usable_python_on_path_is_found(bootstrap: ModuleType, pythons: Path) -> None:
    add_python(pythons, "python3.14", BROKEN_SHIM)
    add_python(pythons, "python3.13", WITHOUT_ENSUREPIP)
    wanted = add_python(pythons, "python3.12", GOOD)
    add_python(pythons, "python3.11", GOOD)

    assert bootstrap.find_python() == str(wanted)


def test_python_without_ensurepip_gets_the_apt_sentence(bootstrap: ModuleType, pythons: Path) -> None:
    add_python(pythons, "python3.11", WITHOUT_ENSUREPIP)

    with pytest.raises(
        SystemExit, match=r"python3\.11 cannot make virtual environments: run `apt install python3-venv`"
    ):
        bootstrap.find_python()


@pytest.mark.usefixtures("pythons")
def test_no_suitable_python_is_said_in_one_sentence(bootstrap: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"Python 3\.11 to 3\.14 is needed and none is on PATH"):
        bootstrap.find_python()


def test_without_arguments_it_says_how_to_use_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(RUN_PY)], cwd=tmp_path, capture_output=True, text=True, check=False, env=dict(os.environ)
    )

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("usage: python3 run.py demo | test | up")


def test_old_python_can_parse_it_and_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(RUN_PY.read_text(encoding="utf-8"), feature_version=(3, 8))

    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names
