"""说给人听的话：一件事一条，好了一条；一下子好几件合成一条。标题里总有 dayline：钉钉的机器人可以拿它当关键词。"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zoneinfo import ZoneInfo

from etl_assets.core.log import redact
from etl_assets.core.text import escape_invisible

MOST_AT_ONCE = 3
"""一下子比这更多，合成一条。"""
_MOST_BYTES = 1_900
"""企业微信的机器人一条只收 2,048 字节，标题在内。"""
_LONGEST, _LONGEST_LISTED = 300, 120

_MORE = "… +{count}: `etl alerts list`"

Language = Literal["zh", "en"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """一条消息；said 是它说了的（etl.alerts 的行），收下之后勾掉。"""

    title: str
    body: str
    is_over: bool
    said: Sequence[Row] = ()


@dataclass(frozen=True)
class _Words:
    wrong: str
    over: str
    several: str
    several_over: str
    remedy: str
    since: str
    test: str
    test_body: str


_WORDS = {
    "zh": _Words(
        "dayline 出了问题（{where}）",
        "dayline 好了（{where}）",
        "dayline 有 {count} 件事出了问题（{where}）",
        "dayline 有 {count} 件事好了（{where}）",
        "怎么办：",
        "从 {since} 起，现在好了。",
        "dayline 测试（{where}）",
        "这是一条测试消息：出了问题时，会像这样告诉你。",
    ),
    "en": _Words(
        "dayline: something is wrong ({where})",
        "dayline: over ({where})",
        "dayline: {count} things are wrong ({where})",
        "dayline: {count} things are over ({where})",
        "What to do: ",
        "It had been so since {since}.",
        "dayline test ({where})",
        "This is a test: when something is wrong, you will be told like this.",
    ),
}


def where_we_are(target: str) -> str:
    """哪台机器、哪套安装：人也许看着好几套。"""
    return socket.gethostname() if target == "public" else f"{socket.gethostname()}, {target}"


def messages_for(rows: Sequence[Row], channel: str, *, language: Language, where: str, zone: ZoneInfo) -> list[Message]:
    """channel 还没有听说的：新的，变大了的，好了的。"""
    due = [row for row in rows if row["is_due"]]
    new = [row for row in due if row["over_at"] is None and _is_news(row, channel)]
    over = [row for row in due if row["over_at"] is not None and channel in row["said"]]
    words = _WORDS[language]
    return [
        *_compose(new, words.wrong, words.several, where, lambda row, longest: _wrong(row, language, longest)),
        *_compose(
            over, words.over, words.several_over, where, lambda row, longest: _over(row, language, longest, zone)
        ),
    ]


def test_message(*, language: Language, where: str) -> Message:
    words = _WORDS[language]
    return Message(words.test.format(where=where), words.test_body, is_over=True)


def _is_news(row: Row, channel: str) -> bool:
    told: int | None = row["said"].get(channel)
    return told is None or bool(row["may_grow"] and row["size"] > told)


def _compose(rows: Sequence[Row], one: str, several: str, where: str, tell: Callable[[Row, int], str]) -> list[Message]:
    if len(rows) <= MOST_AT_ONCE:
        return [
            Message(one.format(where=where), tell(row, _LONGEST), row["over_at"] is not None, [row]) for row in rows
        ]
    title = several.format(count=len(rows), where=where)
    return [Message(title, _listed([tell(row, _LONGEST_LISTED) for row in rows]), rows[0]["over_at"] is not None, rows)]


def _listed(told: Sequence[str]) -> str:
    """放得下几件列几件，至少一件。"""
    lines = [f"{number}. {text}" for number, text in enumerate(told, start=1)]
    listed = len(lines)
    while listed > 1 and len("\n".join(lines[:listed]).encode()) > _MOST_BYTES:
        listed -= 1
    more = [_MORE.format(count=len(lines) - listed)] if listed < len(lines) else []
    return "\n".join([*lines[:listed], *more])


def _wrong(row: Row, language: Language, longest: int) -> str:
    return f"{_cut(row[language], longest)}\n{_WORDS[language].remedy}{_cut(row['remedy'], longest)}"


def _over(row: Row, language: Language, longest: int, zone: ZoneInfo) -> str:
    since = f"{row['since'].astimezone(zone):%Y-%m-%d %H:%M}"
    return f"{_cut(row[language], longest)}\n{_WORDS[language].since.format(since=since)}"


def _cut(text: str, longest: int) -> str:
    """里面有别人的文字：看不见的字符写成转义，长的截短，口令不出去。"""
    line = " ".join(redact(text).split())
    return escape_invisible(line if len(line) <= longest else f"{line[:longest]}…")
