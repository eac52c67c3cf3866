"""文档里的代码块：各是哪一种，命令是哪几条，印出来的像不像文档写的。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMANDS = ("etl", "dayline", "python3", "pdm", "pip", "uv", "uvx", "cat", "zcat", "grep", "curl", "export", "eval")
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")
_COMMENT = re.compile(r"(^|\s+)#\s.*$", re.MULTILINE)
_BORDERS = re.compile(r"[\s━─┏┳┓┡╇┩├┼┤└┴┘╭╮╰╯]*")

_WILD = (
    (r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9a-f]{8}-…", r"[0-9a-f-]{36}"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?", r"\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)?"),
    (r"\d+(?:\.\d+)? m?s\b", r"\d+(?:\.\d+)? m?s"),
    (r"127\.0\.0\.1:\d+", r"127\.0\.0\.1:\d+"),
    (r"worker [\w.-]+:\d+", r"worker [\w.-]+:\d+"),
    (r"…", r".*"),
    (r"\s+", r"\s+"),
)
_NUMBER = (r"\d+(?:[.,]\d+)*", r"\d+(?:[.,]\d+)*")
"""编号、时刻、耗时、端口、工人与表格的宽度各次不同。"""


@dataclass(frozen=True)
class Block:
    """一个代码块。"""

    place: str
    language: str
    text: str

    @property
    def kind(self) -> str:
        """console：带输出的命令；sh：只有命令；别的是写明的语言，没有写明的是空。"""
        first = self.text.split(maxsplit=1)[0]
        if first == "$":
            return "console"
        if self.language in ("", "bash", "shell", "sh") and (first in _COMMANDS or re.match(r"[A-Z_]+=", first)):
            return "sh"
        return self.language

    @property
    def commands(self) -> list[Command]:
        return list(_commands(self.text.splitlines(), prompts=self.kind == "console"))

    @property
    def without_comments(self) -> str:
        """两种语言的注释不同，别的都相同。"""
        return "\n".join(line.rstrip() for line in _COMMENT.sub("", self.text).splitlines())


@dataclass
class Command:
    """一条命令，与文档说它印出的行。"""

    text: str
    shown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return _COMMENT.sub("", self.text).strip()

    @property
    def is_refused(self) -> bool:
        return any(line.startswith("error: ") for line in self.shown)


def pages() -> list[Path]:
    """说明怎样用的每一页；决定与变更记的是当时，docs/reference 由代码生成。"""
    found = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README*.md"), *(ROOT / "docs").rglob("*.md")]
    kept = {page.relative_to(ROOT) for page in found if page.name != "CHANGELOG.md"}
    return sorted(
        page for page in kept if not page.is_relative_to("docs/decisions") and not page.is_relative_to("docs/reference")
    )


def read_blocks(page: Path) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = _BLOCK.finditer(text)
    return [
        Block(f"{page}:{text.count(chr(10), 0, match.start()) + 1}", match[2], dedent(match[3]))
        for match in found
        if match[3].strip()
    ]


def _commands(lines: list[str], *, prompts: bool) -> Iterator[Command]:
    rest = iter(lines)
    command = None
    for line in rest:
        if prompts and not line.startswith("$ "):
            assert command is not None
            command.shown.append(line)
            continue
        text = line.removeprefix("$ ")
        if not _COMMENT.sub("", text).strip():
            continue
        while text.endswith("\\"):
            text += "\n" + next(rest)
        if heredoc := _HEREDOC.search(text):
            while text.splitlines()[-1] != heredoc[1]:
                text += "\n" + next(rest)
        if command is not None:
            yield command
        command = Command(text)
    if command is not None:
        yield command


def missing_lines(shown: list[str], printed: str, *, numbers_vary: bool = False) -> list[str]:
    """文档里的、没有照这个次序印出来的行。文档可以少写几行；表格的边框不算。"""
    lines = iter(printed.splitlines())
    wanted = [line.strip() for line in shown if not _BORDERS.fullmatch(line) and line.strip() != "…"]
    for position, line in enumerate(wanted):
        pattern = re.compile(_pattern(line, numbers_vary=numbers_vary))
        if not any(pattern.fullmatch(each.strip()) for each in lines):
            return wanted[position:]
    return []


def _pattern(line: str, *, numbers_vary: bool) -> str:
    wild = (*_WILD, _NUMBER) if numbers_vary else _WILD
    pieces, end = [], 0
    for match in re.finditer("|".join(f"({shown})" for shown, _ in wild), line):
        pieces += [re.escape(line[end : match.start()]), wild[(match.lastindex or 1) - 1][1]]
        end = match.end()
    return "".join(pieces) + re.escape(line[end:])
