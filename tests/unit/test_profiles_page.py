"""docs/profiles.md：每个随包的配置、每个键都在里面，两种语言都是。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from bridge.imports.rules.profile import (
    AmountTarget,
    FileFormat,
    Grouping,
    Orders,
    Platform,
    Profile,
    TimeTarget,
    shipped_profiles,
)

DOCS = Path(__file__).parents[2] / "docs"
MODELS: list[type[BaseModel]] = [Profile, FileFormat, Grouping, Orders, Platform, AmountTarget, TimeTarget]
SECTIONS = {"file", "group", "orders", "platform"}


@pytest.mark.parametrize("page", ["profiles.md", "profiles.zh-CN.md"])
def test_every_shipped_profile_and_every_key_is_explained(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`\[?([a-z_0-9]+)\]?[` ]", text))
    keys = {name for model in MODELS for name in model.model_fields}
    assert keys - named == set()
    assert {f"`[{section}]`" for section in SECTIONS} - set(re.findall(r"`\[[a-z]+\]`", text)) == set()
    assert set(shipped_profiles()) - named == set()


def test_both_languages_explain_the_same() -> None:
    english, chinese = ((DOCS / page).read_text(encoding="utf-8") for page in ("profiles.md", "profiles.zh-CN.md"))
    assert [len(re.findall(r"^\|", text, re.MULTILINE)) for text in (english, chinese)] == [
        english.count("\n|"),
        english.count("\n|"),
    ]
    first_cells = [re.findall(r"^\| (`[a-z_0-9]+`)", text, re.MULTILINE) for text in (english, chinese)]
    assert first_cells[0] == first_cells[1]
