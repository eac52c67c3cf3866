"""装好的 wheel：检出的代码不在，家是空的，照样能用。"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("bridge", "etl_assets")
BUILD = "import sys; from pdm.backend import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("dayline-*.whl"))


@pytest.fixture(scope="module")
def machine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """一个虚拟环境：dayline 来自 wheel；它要的包借这里已经装着的，不联网。"""
    folder = tmp_path_factory.mktemp("machine")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        wheel,
    ]
    subprocess.run([str(word) for word in pip], check=True, env=os.environ | {"PIP_USER": "0"})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # 一行路径只加这个文件夹，不理会它里面指着检出代码的 .pth
    (venv / "lib" / version / "site-packages" / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(machine: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    home = machine / "home"
    home.mkdir(exist_ok=True)
    environment = {"HOME": str(home), "PATH": os.defpath, "LANG": "C.UTF-8", "TMPDIR": str(machine)}
    command = [machine / "venv" / "bin" / name, *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=280)


def test_wheel_holds_every_file_of_the_packages_and_the_licence(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*") if is_source(path)
    }
    with zipfile.ZipFile(wheel) as contents:
        names = set(contents.namelist())
    assert {name for name in names if name.partition("/")[0] in PACKAGES} == tracked
    assert {f"{package}/py.typed" for package in PACKAGES} <= tracked
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def test_both_names_start_and_say_their_own(machine: Path) -> None:
    for name in ("etl", "dayline"):
        result = run(machine, name, "--help")
        assert result.stdout.startswith(f"Usage: {name} "), result.stderr


def test_code_comes_from_the_wheel(machine: Path) -> None:
    printed = run(
        machine, "python", "-c", "import bridge, etl_assets; print(bridge.__file__, etl_assets.__file__)"
    ).stdout.split()
    assert [Path(path).is_relative_to(machine / "venv") for path in printed] == [True, True]


def test_demo_runs_without_the_checkout_and_leaves_nothing(machine: Path) -> None:
    result = run(machine, "dayline", "demo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All imports are in the tables." in result.stdout
    left = {path.name for path in machine.iterdir() if not path.name.startswith("dayline-postgres-")}
    assert left == {"home", "venv"}  # 进不去装着它的文件夹时，PostgreSQL 的一份拷贝留着再用


def test_every_package_that_is_imported_is_declared() -> None:
    """`machine` 借来的包比声明的多：漏了的那里看不出来。"""
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in distribution("dayline").requires or ()}
    assert {package for package in set(imported()) if not providers(package) & with_what_they_bring(declared)} == set()


def imported() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if "testing" not in path.parts:  # 给写资产的人的 pytest 夹具
                yield from imports_of(path) - sys.stdlib_module_names - {*PACKAGES}


def imports_of(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.partition(".")[0]
        for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    }


def providers(package: str) -> set[str]:
    return {canonical(name) for name in installed().get(package, ())}


@cache
def installed() -> Mapping[str, list[str]]:
    """要读每个装着的包的清单：只读一次。"""
    return packages_distributions()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_what_they_bring(names: set[str]) -> set[str]:
    """连同它们自己要的：dagster 带来的也装得上。"""
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        try:
            requires = distribution(name).requires or ()
        except PackageNotFoundError:  # 别的平台才要的
            continue
        waiting += [canonical(re.split(r"[^\w.-]", text)[0]) for text in requires if "extra ==" not in text]
    return found
