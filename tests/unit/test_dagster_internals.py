"""Dagster 的私有名字只在四个模块里导入，而且都还在原处。

不导入那四个模块，只读它们的源文件：名字搬了家，它们自己已经导入不了，这里还说得出是哪一个。
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERNALS = (
    "bridge/warm_dagster/daemon_internals.py",
    "bridge/warm_dagster/internals.py",
    "bridge/warm_dagster/webserver_internals.py",
    "etl_assets/orchestration/internals.py",
)
OTHERS = sorted(
    {
        str(path.relative_to(ROOT))
        for side in ("bridge", "etl_assets", "benchmarks")
        for path in (ROOT / side).rglob("*.py")
    }
)
PUBLIC = {"dagster", "dagster_postgres"}


def private_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(模块, 名字)：公开的只有两个包的最外一层里不带下划线的名字。"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (
            each
            for each in found
            if each[0].startswith("dagster") and (each[0] not in PUBLIC or each[1].startswith("_"))
        )


def parse(path: str) -> ast.AST:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


@pytest.mark.parametrize("path", [path for path in OTHERS if path not in INTERNALS])
def test_other_modules_import_public_names_only(path: str) -> None:
    assert list(private_imports(parse(path))) == [], f"{path}: import these from {' or '.join(INTERNALS)}"


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(*each, id=".".join(each)) for path in INTERNALS for each in private_imports(parse(path))],
)
def test_private_name_is_where_it_is_imported_from(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"this version of Dagster has no {name} in {module}: find it, correct the import"
    )


@pytest.mark.parametrize("path", INTERNALS)
def test_internals_hold_nothing_else_and_nothing_unused(path: str) -> None:
    names = {name for _, name in private_imports(parse(path))}
    side = [other for other in OTHERS if other not in INTERNALS and other.startswith(path.split("/")[0])]
    used = {
        node.attr
        for other in side
        for node in ast.walk(parse(other))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == Path(path).stem
    }
    imported = {
        alias.name
        for other in side
        for node in ast.walk(parse(other))
        if isinstance(node, ast.ImportFrom) and node.module == path.removesuffix(".py").replace("/", ".")
        for alias in node.names
    }
    assert names == used | imported, f"unused: {names - used - imported}"


def test_private_modules_named_in_settings_and_commands_exist() -> None:
    """dagster.yaml 里的类、`python -m` 的模块：只是字符串，别的检查看不见。"""
    named = {
        node.value
        for path in OTHERS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"dagster\._[\w.]+", node.value)
    }
    assert {"dagster._core.storage.root", "dagster._daemon.controller"} <= named
    assert [name for name in sorted(named) if importlib.util.find_spec(name) is None] == []
