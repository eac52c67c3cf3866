"""docs/trace.md：它说的每个文件、每个函数都还在。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
FILES = [path for package in ("bridge", "etl_assets") for path in (ROOT / package).rglob("*.py")]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)(?::\s+([\w.]+))?`", TRACE)))
NAMES = sorted(set(re.findall(r"`([a-z_]*[a-z]+_[a-z_]+)`", TRACE)))


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_file_has_what_the_trace_says(file: str, name: str) -> None:
    found = [text for path, text in SOURCES.items() if f"/{path}".endswith(f"/{file}")]
    assert found, f"there is no {file}"
    for each in name.split(".") if name else ():
        assert any(re.search(rf"\b{each}\b", text) for text in found), f"{file} has no {each}"


@pytest.mark.parametrize("name", NAMES)
def test_name_is_in_the_code(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", text) for text in SOURCES.values())
