"""一种语言的页面摆成 Zensical 要的样子：仓库里的链接（给 GitHub 看的）换成网站里的。"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from handbook.chapters import CHAPTERS, DECISIONS
from handbook.repository import DOCS, LANGUAGES, ROOT, Language

_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)")
_LIST_AFTER_TEXT = re.compile(r"^(?!\s*(?:[-*] |\d+\. |\||$))(.+)\n(?=(?:[-*]|\d+\.) )", re.MULTILINE)
_OTHER_LANGUAGE = re.compile(r"^\[(?:中文|English)\]\([^)]*\)\n+", re.MULTILINE)
_PIPE_IN_CODE = re.compile(r"`[^`\n]*`")
_BREAK_IN_CHINESE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])")


class BrokenLinkError(ValueError):
    """页面里的链接指向仓库里没有的文件。"""


@dataclass(frozen=True)
class Places:
    """仓库里的文件 → 网站里的名字。

    :param own: 这种语言的网站里的。
    :param either: 两种语言的：链接到另一种语言的，成为这种语言的同一页；标题是另一种语言的，锚就对不上。
    """

    own: Mapping[Path, str]
    either: Mapping[Path, str]

    def find(self, target: Path, anchor: str) -> str | None:
        if target in self.own:
            return f"{self.own[target]}.md{'#' + anchor if anchor else ''}"
        if target.parent == ROOT and target.name.startswith("README."):
            return "index.md"  # 它自己不在网站里
        return f"{self.either[target]}.md" if target in self.either else None


def stage_pages(language: Language, folder: Path) -> None:
    """把页面与图写进 folder。

    :raises BrokenLinkError: 一个链接指向没有的文件。
    """
    notes = {note: f"decisions/{note.stem}" for note in sorted(DECISIONS.glob("*.md"))}
    own = {chapter.source(language): chapter.name for chapter in CHAPTERS}
    either = {chapter.source(each): chapter.name for each in LANGUAGES for chapter in CHAPTERS}
    places = Places({**own, **notes, DECISIONS: "decisions/index"}, either)
    for source, name in {**own, **notes}.items():
        page = folder / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(staged_text(source, name, places), encoding="utf-8")
    (folder / "decisions" / "index.md").write_text(_decisions_page(language, notes), encoding="utf-8")
    shutil.copytree(DOCS / "images", folder / "images")


def staged_text(source: Path, name: str, places: Places) -> str:
    text = _OTHER_LANGUAGE.sub("", source.read_text(encoding="utf-8"), count=1)
    link = _rewriter(source, name, places)
    pieces = _FENCE.split(text)
    return "".join(piece if piece.startswith("```") else _outside_code(piece, link) for piece in pieces)


def _outside_code(text: str, link: Callable[[re.Match[str]], str]) -> str:
    """Python-Markdown 与 GitHub 不同的两处：列表前面要空一行；表里的代码不转义竖线。汉字之间的换行不成空格。"""
    separated = _BREAK_IN_CHINESE.sub("", _LIST_AFTER_TEXT.sub(r"\1\n\n", text))
    lines = [
        _PIPE_IN_CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in separated.split("\n")
    ]
    return _LINK.sub(link, "\n".join(lines))


def _rewriter(source: Path, name: str, places: Places) -> Callable[[re.Match[str]], str]:
    def rewrite(found: re.Match[str]) -> str:
        to, _, anchor = found["to"].partition("#")
        if not to or ":" in to:
            return found[0]
        target = (source.parent / to).resolve()
        if not target.exists():
            raise BrokenLinkError(f"{source}: there is no {to}")
        place = f"images/{target.name}" if found["image"] else places.find(target, anchor)
        if place is None:
            return found["text"]  # 代码与别的文件不在网站里
        return f"{found['image']}[{found['text']}]({posixpath.relpath(place, posixpath.dirname(name) or '.')})"

    return rewrite


def _decisions_page(language: Language, notes: Iterable[Path]) -> str:
    title, intro = {
        "en": ("Decisions", "Why things are as they are: context, choice, cost."),
        "zh-CN": ("决定", "为什么是这样：背景、选择、代价。各条只有英文。"),
    }[language]
    lines = [f"- [{_heading(note)}]({note.name})" for note in notes]
    return "\n\n".join([f"# {title}", intro, "\n".join(lines)]) + "\n"


def _heading(page: Path) -> str:
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
