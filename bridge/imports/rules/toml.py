"""写 TOML：标准库只读。文字与数组照 JSON 写就是 TOML，只有 DEL 要转义。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(value: Any) -> str:
    """一个值；映射写成行内表。"""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {to_toml(each)}" for name, each in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else to_toml(name)
