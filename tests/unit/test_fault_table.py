"""docs/faults.md：每一行都指着真有的测试；两种语言的表是同一张。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = ("docs/faults.md", "docs/faults.zh-CN.md")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows(table: str) -> list[str]:
    """表的各行，不含表头与分隔线。"""
    lines = [line for line in (ROOT / table).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [line for line in lines if "`tests/" in line]


def named_tests(line: str) -> list[tuple[str, str]]:
    return _TEST.findall(line)


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("line", rows(TABLES[0]))
def test_every_fault_names_tests_that_exist(line: str) -> None:
    assert len(line.split(" | ")) == 4
    assert [name for path, name in named_tests(line) if name not in functions(path)] == []


def test_both_languages_have_the_same_rows() -> None:
    english, chinese = ([named_tests(line) for line in rows(table)] for table in TABLES)
    assert english
    assert chinese == english
