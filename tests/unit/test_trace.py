"""docs/trace.md，两种语言：它说的每个文件、每个函数都还在。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE, CHINESE = ((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("trace.md", "trace.zh-CN.md"))
FILES = [path for package in ("bridge", "etl_assets") for path in (ROOT / package).rglob("*.py")]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
PLACE = re.compile(r"`([\w/]+\.py)(?::\s+([\w.]+))?`")
PLACES = sorted(set(PLACE.findall(TRACE)))
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


def test_both_languages_name_the_same_code() -> None:
    assert sorted(set(PLACE.findall(CHINESE))) == PLACES
    assert sorted(set(re.findall(r"`([^`]+)`", CHINESE))) == sorted(set(re.findall(r"`([^`]+)`", flat(TRACE))))


def flat(text: str) -> str:
    """英文页有的代码断在行尾。"""
    return re.sub(r"\s*\n\s*", " ", text)
