"""命令的一页：click 知道的每个命令、参数、选项。"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from bridge.cli.commands import cli
from handbook.chinese import say
from handbook.markdown import code, page, table
from handbook.repository import Language

_WORDS = {
    "title": {"en": "Commands", "zh-CN": "命令"},
    "intro": {
        "en": "`etl COMMAND --help` prints the same. `dayline` is another name of `etl`. Exit codes, completion, colour: "
        "[In a shell](../shell.md).",
        "zh-CN": "`etl 命令 --help` 印出的也是这些（英文）。`dayline` 是 `etl` 的另一个名字。退出码、补全、颜色："
        "[在 shell 里](../shell.zh-CN.md)。",
    },
    "option": {"en": "option", "zh-CN": "选项"},
    "meaning": {"en": "meaning", "zh-CN": "意思"},
}

_CLICK_WORDS = {"default: ": "缺省：", "required": "必须有"}


def commands_page(language: Language) -> str:
    words = {name: both[language] for name, both in _WORDS.items()}
    root = click.Context(cli, info_name="etl")
    sections = [_section(context, language, words) for context in _contexts(root)]
    return page(words["title"], words["intro"], *sections)


def _contexts(parent: click.Context) -> Iterator[click.Context]:
    """每个命令，组在它的命令前面。"""
    group = parent.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None  # noqa: S101  list_commands 说有的
        context = click.Context(command, info_name=name, parent=parent)
        yield context
        yield from _contexts(context)


def _section(context: click.Context, language: Language, words: dict[str, str]) -> str:
    command = context.command
    usage = context.get_usage().split(maxsplit=1)[1]
    paragraphs = [say(each, language) for each in inspect.cleandoc(command.help or "").split("\n\n")]
    options = [_option(context, each, language) for each in command.params if isinstance(each, click.Option)]
    rows = table((words["option"], words["meaning"]), options) if options else ""
    heading = f"## `{context.command_path}`"
    return "\n\n".join(filter(None, [heading, f"```text\n{' '.join(usage.split())}\n```", *paragraphs, rows]))


def _option(context: click.Context, option: click.Option, language: Language) -> tuple[str, str]:
    """说明，与 click 说的缺省、范围。"""
    record = option.get_help_record(context)
    assert record is not None  # noqa: S101  这里没有藏起来的选项
    names, text = record
    english = option.help or ""
    extra = text.removeprefix(english).strip().strip("[]")
    for word, chinese in _CLICK_WORDS.items() if language != "en" else ():
        extra = extra.replace(word, chinese)
    return code(names), " ".join(filter(None, [say(english, language), code(extra)]))
