"""llms.txt：给语言模型看的目录，一页一行，由各页自己的第一段说是什么。"""

from __future__ import annotations

import re

from handbook.chapters import PARTS, Chapter
from handbook.repository import ROOT

_SUMMARY = (
    "Platform exports of orders go in; clean orders, customers and business leads come out, day by day. "
    "NATS events, TaskIQ workers, Dagster runs, Polars, PostgreSQL."
)
_LONGEST = 200


def llms_txt() -> str:
    parts = [f"## {part.english}\n\n" + "\n".join([_line(chapter) for chapter in part.chapters]) for part in PARTS]
    return "\n\n".join(["# dayline", f"> {_SUMMARY}", *parts]) + "\n"


def _line(chapter: Chapter) -> str:
    source = chapter.source("en")
    text = source.read_text(encoding="utf-8")
    return f"- [{chapter.english}]({source.relative_to(ROOT)}): {_first_sentence(text)}"


def _first_sentence(text: str) -> str:
    """第一段文字的第一句；标题、换语言的链接、表、图、列表、代码块都不算。"""
    paragraphs = [" ".join(each.split()) for each in text.split("\n\n")]
    prose = next(each for each in paragraphs if not re.match(r"[#|<!\-]|```|\[(中文|English)\]", each))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    sentence = re.split(r"(?<=[.。])\s|(?<=。)", plain)[0].rstrip(":：")
    return sentence if len(sentence) <= _LONGEST else sentence[:_LONGEST].rsplit(" ", 1)[0] + " …"
