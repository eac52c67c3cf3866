"""文字规则：修剪、缺失、折叠大小写、客户名的规范写法。"""

from __future__ import annotations

import re
import unicodedata

# Unicode PropList.txt 的 White_Space，25 个。Python 自己的 strip() 还会去掉 U+001C..U+001F，所以不能不带参数。
WHITE_SPACE = "".join(
    map(
        chr,
        (
            *range(0x0009, 0x000E),
            0x0020,
            0x0085,
            0x00A0,
            0x1680,
            *range(0x2000, 0x200B),
            0x2028,
            0x2029,
            0x202F,
            0x205F,
            0x3000,
        ),
    )
)
_WHITE_SPACE_RUN = re.compile(f"[{WHITE_SPACE}]+")


def trim(text: str) -> str:
    return text.strip(WHITE_SPACE)


def trim_or_missing(text: str | None) -> str | None:
    """修剪后是空串就是缺失。"""
    return (trim(text) or None) if text is not None else None


def is_blank(text: str | None) -> bool:
    return trim_or_missing(text) is None


def fold_status(status: str) -> str:
    return trim(status).casefold()


def normalize_name(nickname: str) -> str:
    """先 NFKC，再修剪，再把中间的每段空白并成一个空格。"""
    return _WHITE_SPACE_RUN.sub(" ", trim(unicodedata.normalize("NFKC", nickname)))
