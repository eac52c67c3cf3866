"""给人看的行：放得下是表格，放不下就一条一段、一列一行。

终端常是 80 列。硬把九列挤进去，rich 会把客户名折成一列单字，再窄就什么也不剩。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from bridge.cli.output import cell
from etl_assets.core.settings import get_settings

_WORD_CHARACTERS = 24
"""比这更长的一个词（消费者的名字、地址）可以从中间折开。"""
_EDGE, _BESIDE = 1, 3  # 表格左边一条线；每列两个空格与它右边的线


@dataclass(frozen=True)
class _Column:
    name: str
    cells: Sequence[Text]
    justify: Literal["left", "right"]
    whole: bool
    """不折行：标识要能整个复制。"""

    @property
    def full(self) -> int:
        return max(map(cell_len, (self.name, *map(str, self.cells))))

    @property
    def least(self) -> int:
        """再窄就不好读了。"""
        if self.whole:
            return self.full
        words = [word for text in (self.name, *map(str, self.cells)) for word in text.split()]
        return min(max(map(cell_len, words), default=1), _WORD_CHARACTERS)


@dataclass(frozen=True)
class Rows:
    """要到画的时候才知道有多宽。"""

    columns: Sequence[_Column]
    title: str | None
    cut: str | None

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width - _EDGE - _BESIDE * len(self.columns)
        if sum(column.least for column in self.columns) <= room:
            yield self._table(room)
            return
        if self.title is not None:
            yield cell(self.title, "italic")
        yield self._records()

    def _table(self, room: int) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column, width in zip(self.columns, _shared_out(self.columns, room), strict=True):
            table.add_column(column.name, justify=column.justify, overflow="fold", width=width)
        for row in zip(*(column.cells for column in self.columns), strict=True):
            cells = {column.name: text.copy() for column, text in zip(self.columns, row, strict=True)}
            if self.cut is not None:
                cells[self.cut].no_wrap, cells[self.cut].overflow = True, "ellipsis"
            table.add_row(*cells.values())
        return table

    def _records(self) -> RenderableType:
        rows = list(zip(*(column.cells for column in self.columns), strict=True))
        if not rows:
            return Text("no rows")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        for number, row in enumerate(rows):
            if number:
                grid.add_row()
            for column, text in zip(self.columns, row, strict=True):
                if text:
                    grid.add_row(column.name, text)
        return grid


def table_of(
    records: Sequence[Mapping[str, Any]], columns: Sequence[str], *, title: str | None = None, cut: str | None = None
) -> Rows:
    """`print_rows` 印的就是它。

    :param cut: 表格里放不下就截短、不折行的那一列。
    """
    return Rows([_column(records, name) for name in columns], title, cut)


def readable(value: Any) -> str:
    """给人看的一格：时刻到秒，按业务时区。"""
    value = in_zone(value)
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return "" if value is None else str(value)


def in_zone(value: Any) -> Any:
    return value.astimezone(get_settings().zone) if isinstance(value, datetime) else value


def _column(records: Sequence[Mapping[str, Any]], name: str) -> _Column:
    values = [record[name] for record in records]
    numeric = bool(values) and all(isinstance(value, int | float) or value is None for value in values)
    cells = [cell(readable(value)) for value in values]
    return _Column(name, cells, "right" if numeric else "left", whole=name.endswith("_id"))


def _shared_out(columns: Sequence[_Column], room: int) -> list[int]:
    """每列先得到最少要的；剩下的先给差得少的，差得多的折行。"""
    widths = [column.least for column in columns]
    spare = room - sum(widths)
    wanting = sorted(range(len(columns)), key=lambda at: columns[at].full - widths[at])
    for served, at in enumerate(wanting):
        given = min(columns[at].full - widths[at], spare // (len(wanting) - served))
        widths[at] += given
        spare -= given
    return widths
