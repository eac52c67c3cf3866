"""全角与各国的空格、减号、撇号，换成 ASCII 里同义的字。"""

from __future__ import annotations

import polars as pl

_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
# 看不见的方向标记与零宽字符：从网页与双向文字里带来的
_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_FULL_WIDTH = {chr(0xFF01 + offset): chr(0x21 + offset) for offset in range(94)}
_SAME = {
    **_FULL_WIDTH,
    **dict.fromkeys(_SPACES, " "),
    **dict.fromkeys(_INVISIBLE, ""),
    "\u2212": "-",
    "\u2019": "'",
    "\uffe5": "¥",
}


def to_ascii(text: pl.Series) -> pl.Series:
    """没有这些字的原样返回。"""
    if not (text.str.len_bytes() > text.str.len_chars()).any():
        return text
    return text.str.replace_many(list(_SAME), list(_SAME.values()))


def full_width_to_ascii(text: pl.Expr) -> pl.Expr:
    return text.str.replace_many(list(_FULL_WIDTH), list(_FULL_WIDTH.values()))
