"""代码里的英文（命令的帮助、设置的说明）的中文；英文只写在代码里，中文只写在 chinese.toml 里。"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path

from handbook.repository import Language


class UnknownTextError(LookupError):
    """代码里的一句话还没有中文。"""


@lru_cache(maxsize=1)
def catalogue() -> dict[str, str]:
    found: dict[str, str] = tomllib.loads(Path(__file__).with_name("chinese.toml").read_text(encoding="utf-8"))
    return found


def say(english: str, language: Language) -> str:
    """:raises UnknownTextError: 说出缺的那一句。"""
    text = " ".join(english.split())
    if language == "en" or not text:
        return text
    try:
        return catalogue()[text]
    except KeyError:
        raise UnknownTextError(f"handbook/chinese.toml has no Chinese for {text!r}: add it") from None
