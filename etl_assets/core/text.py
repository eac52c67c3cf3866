"""文字规则：哪些是空白（Polars、SQL 与 Python 三处共用这一张表），哪些给人看时要写成转义。"""

from __future__ import annotations

import json
import re

# Unicode White_Space 属性的全部 25 个字符（PropList.txt），与 Polars strip_chars() 相同
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

MAX_TEXT_LENGTH = 500
"""订单号与客户名最长的字数；再长的行拒收。"""


def storable(text: str) -> str:
    """PostgreSQL 存得下的文字：NUL 与半个代理对换掉。错误的消息里什么都可能有。"""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


# Unicode 的 Cc、Cf、Cs、Zl、Zp：终端当作命令的、改变文字方向的、没有宽度的
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)


def escape_invisible(text: str, *, keep: str = "") -> str:
    """看不见的字符写成 `\\x1b`、`\\u202e` 这样；不能还原，只给人看。"""
    return _INVISIBLE.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )


def escape_in_json(document: str) -> str:
    """同样的字符在一段 JSON 里写成 JSON 自己的转义：值不变。"""
    return _INVISIBLE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], document)
