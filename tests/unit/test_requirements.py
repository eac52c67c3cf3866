"""docs/requirements.md：每条需求点名的文件与测试都在；有的需求只有看代码才知道，就在这里看。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("requirements.md", "requirements.zh-CN.md")
_NAMED = re.compile(r"`([\w./]+)(?:::(test_\w+))?`")
_PRODUCT = [path for package in ("bridge", "etl_assets") for path in sorted((ROOT / package).rglob("*.py"))]


def named(page: str) -> dict[str, list[tuple[str, str]]]:
    """需求 → 它点名的文件与测试。"""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    sections = re.split(r"^## ((?:REQ|NFR)-\d+).*$", text, flags=re.MULTILINE)[1:]
    lines = {name: re.findall(r"^- .*$", body, re.MULTILINE) for name, body in zip(*[iter(sections)] * 2, strict=True)}
    return {name: _NAMED.findall("\n".join(each)) for name, each in lines.items()}


def test_every_requirement_is_there_in_both_languages() -> None:
    english, chinese = map(named, PAGES)
    assert list(english) == [f"REQ-{number:03}" for number in range(1, 11)] + [
        f"NFR-{number:03}" for number in range(1, 5)
    ]
    assert chinese == english


@pytest.mark.parametrize("requirement", named(PAGES[0]))
def test_every_file_and_test_that_is_named_exists(requirement: str) -> None:
    where = named(PAGES[0])[requirement]
    assert [path for path, _ in where if not (ROOT / path).exists()] == []
    tests = [(path, test) for path, test in where if test]
    assert tests
    assert [(path, test) for path, test in tests if test not in functions(ROOT / path)] == []


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_engines_of_the_product_are_made_in_one_place() -> None:
    """另外几处各有各的库：给人写测试的夹具、Dagster 的库建起来、清它的旧运行。"""
    made = [
        path.relative_to(ROOT).as_posix() for path in _PRODUCT if "create_engine(" in path.read_text(encoding="utf-8")
    ]
    assert made == [
        "bridge/stack/dagster_home.py",
        "bridge/warm_dagster/old_runs.py",
        "etl_assets/core/database_sync.py",
        "etl_assets/testing/databases.py",
    ]


def test_what_had_to_go_is_gone() -> None:
    """示例、空文件、换了名字的文件。"""
    assert [path for path in _PRODUCT if path.name in ("etl_v2.py", "event_tasks.py", "models.py")] == []
    empty = [path for path in _PRODUCT if not path.read_text(encoding="utf-8").strip() and path.name != "__init__.py"]
    assert empty == []
    assert (ROOT / "etl_assets" / "leads" / "etl.py").is_file()
