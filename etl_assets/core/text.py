"""文字规则：空白字符的定义。Polars、SQL 与 Python 三处共用这一张表。"""

from __future__ import annotations

# Unicode White_Space 属性的全部 25 个字符（PropList.txt），与 Polars strip_chars() 相同
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def storable(text: str) -> str:
    """PostgreSQL 存得下的文字：NUL 与半个代理对换掉。错误的消息里什么都可能有。"""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
