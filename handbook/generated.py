"""从代码生成、收在仓库里的文件；`pdm run docs` 写下它们，测试比较。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from handbook.llms import llms_txt
from handbook.reference.commands import commands_page
from handbook.reference.settings import settings_page
from handbook.reference.subjects import subjects_page
from handbook.reference.tables import tables_page
from handbook.repository import DOCS, LANGUAGES, ROOT, written_in

_PAGES = {"commands": commands_page, "settings": settings_page, "subjects": subjects_page, "tables": tables_page}
REFERENCE: Mapping[Path, Callable[[], str]] = {
    DOCS / "reference" / written_in(language, name): partial(page, language)
    for name, page in _PAGES.items()
    for language in LANGUAGES
}
"""文件 → 它该写着什么。"""


def write_generated() -> list[Path]:
    """写下变了的，返回它们。llms.txt 读页面，所以在后面。"""
    changed = [path for path, page in REFERENCE.items() if _write(path, page())]
    index = ROOT / "llms.txt"
    return [*changed, *([index] if _write(index, llms_txt()) else [])]


def _write(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True
