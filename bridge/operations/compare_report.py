"""比较的结果给人与程序看：JSON 的对象、自足的 HTML 一页，以及一个值怎样写给人看。"""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.resources import files
from itertools import takewhile
from typing import Any

import jinja2

from etl_assets.comparison.comparing import Comparison, TableComparison

_LONGEST_CHARACTERS = 120
_BEFORE_DIFFERENCE_CHARACTERS = 40


def describe(comparison: Comparison) -> dict[str, Any]:
    """JSON 里的样子；写的人用 `json.dumps(…, default=str)`：日子、时刻、小数、uuid 都成文字。"""
    return {
        "equal": comparison.equal,
        "compared_at": comparison.compared_at.isoformat(),
        "request": asdict(comparison.request),
        "tables": [
            {"equal": table.equal, "equal_rows": table.equal_rows, "equal_share": table.equal_share, **asdict(table)}
            for table in comparison.tables
        ],
    }


def render_html(comparison: Comparison) -> str:
    """一个文件的 HTML：没有脚本，没有外部资源，值都转义。"""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": "{:,}".format, "share": show_share, "value": show_value}
    template = environment.from_string(
        files("bridge").joinpath("compare_report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(comparison=comparison, request=comparison.request, show_pair=show_pair, summarize=summarize)


def summarize(comparison: Comparison) -> str:
    """一句话：相同，没有行可比，或者哪些表有多少行不同。"""
    request = comparison.request
    if not any(table.rows_left or table.rows_right for table in comparison.tables):
        return f"{request.left} and {request.right} have no rows to compare"
    if comparison.equal:
        return f"{request.left} and {request.right} are equal"
    different = ", ".join(f"{table.table} in {_rows(table)}" for table in comparison.tables if not table.equal)
    return f"{request.left} and {request.right} differ: {different}"


def _rows(table: TableComparison) -> str:
    rows = table.missing + table.extra + table.differing
    return f"{rows:,} of {table.rows_left + table.extra:,} rows"


def show_share(table: TableComparison) -> str:
    """相同的份额，往下取整：差一行也不是 100 %。"""
    return f"{math.floor(table.equal_share * 1_000_000) / 10_000:g} %"


def show_pair(left: str | None, right: str | None) -> tuple[str, str]:
    """两个不同的值；长的从不同的地方附近截取。"""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left or "", right or "", strict=False)))
    begin = same - _BEFORE_DIFFERENCE_CHARACTERS
    return show_value(left, begin=begin), show_value(right, begin=begin)


def show_value(value: object, *, begin: int = 0) -> str:
    """一个值：看不见的字符、首尾的空白、空串都写得看得见，与 NULL 不混。"""
    if value is None:
        return "NULL"
    text = str(value)
    if len(text) <= _LONGEST_CHARACTERS:
        return _visible(text)
    begin = max(0, begin)
    end = begin + _LONGEST_CHARACTERS
    return f"{'…' if begin else ''}{_visible(text[begin:end])}{'…' if end < len(text) else ''}"


def _visible(text: str) -> str:
    plain = (
        text.isprintable()
        and text == text.strip()
        and text not in ("", "NULL")
        and "  " not in text
        and "'" not in text
    )
    return text if plain else repr(text)
