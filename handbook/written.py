"""代码里没有写的说明：表、列、主题、字段、流各是什么，两种语言并排写在 written.toml 里。"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from handbook.chinese import UnknownTextError
from handbook.repository import Language


@lru_cache(maxsize=1)
def texts() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("written.toml").read_text(encoding="utf-8"))


def is_written(kind: str, name: str) -> bool:
    """别人放进来的资产，它的表与事件这里没有；参考页照样列出，只是不说是什么。"""
    return name in texts()[kind]


def written(kind: str, name: str, language: Language, *, of: str = "") -> str:
    """:param of: 列属于哪张表；几张表里意思一样的列只写一次。

    :raises UnknownTextError: 说出缺的那一段。
    """
    found = texts()[kind]
    both = found.get(f"{of}.{name}" if of else name) or found.get(name)
    if both is None:
        raise UnknownTextError(f"handbook/written.toml has no [{kind}] {of + '.' if of else ''}{name}: add it")
    english, chinese = both
    return str(english if language == "en" else chinese)
