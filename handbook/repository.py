"""检出的文件夹，与两种语言：页面 `x.md` 是英文，`x.zh-CN.md` 是中文。"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

Language = Literal["en", "zh-CN"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


def written_in(language: Language, name: str) -> str:
    """一个名字（没有后缀的路径）在这种语言里的文件。"""
    return f"{name}.md" if language == "en" else f"{name}.{language}.md"
