"""命令行往外写的唯一出口：别人的文字到了哪种媒介，就按那种媒介去掉它的效力。

终端：控制字符、改变方向的、看不见的，都写成转义，不起作用。JSON：同样这些字符写成 JSON 自己的转义，值不变。
CSV：会被表格软件当成公式的文字前面加一个单引号（OWASP 的做法）；数字是数字，不动。
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from etl_assets.core.text import escape_in_json, escape_invisible

# 全角的在中文的 Excel 里也是公式的开头
_FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)*")


def say(text: str = "", *, err: bool = False) -> None:
    """一句话，或一段话：换行与制表符照旧。"""
    click.echo(escape_invisible(text, keep="\n\t"), err=err)


def say_json(value: Any, *, indent: int | None = 2) -> None:
    click.echo(escape_in_json(json.dumps(value, ensure_ascii=False, indent=indent, default=_in_json)))


def say_csv(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """写到终端上的也是给终端看的。"""
    buffer = io.StringIO()
    # 缺省的不给回车加引号，而表格软件在回车处另起一行，后面的又是一格的开头
    minimal, quoted = (
        csv.DictWriter(buffer, columns, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    minimal.writeheader()
    for record in records:
        row = {name: _defused(value) for name, value in record.items()}
        (quoted if any("\r" in str(value) for value in row.values()) else minimal).writerow(row)
    text = buffer.getvalue()
    click.echo(escape_invisible(text, keep="\n\t") if sys.stdout.isatty() else text, nl=False)


def cell(text: str, style: str = "") -> Text:
    """表格里的一格：不是标记（客户名里可以有方括号），也不能撑破一行。"""
    return Text(escape_invisible(text), style)


def _in_json(value: Any) -> str:
    """时刻照 ISO 8601 与 RFC 3339，日期与时间之间是 T：别的语言的解析器不都认空格。"""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _defused(value: Any) -> Any:
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
