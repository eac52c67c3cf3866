"""来源的列与配置说的不完全一样时：可以没有的列补成空的，只写在一单第一行的列向下填。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import polars as pl

from bridge.imports.files.cells import CellBlock, Source
from bridge.imports.rules.problems import MERGED
from bridge.imports.rules.profile import FileFormat


def complete(source: Source, file: FileFormat) -> Source:
    """照 optional 与 fill_down 补齐。"""
    added = tuple(name for name in file.optional if name not in source.columns)
    filled = tuple(name for name in file.fill_down if name in source.columns)
    if not added and not filled:
        return source
    return replace(
        source,
        columns=(*source.columns, *added),
        added=frozenset(added),
        blocks=_complete(source.blocks, added, filled),
        reread=lambda: _complete(source.reread(), added, filled),
    )


def _complete(blocks: Iterable[CellBlock], added: Sequence[str], filled: Sequence[str]) -> Iterator[CellBlock]:
    above: dict[str, str | None] = dict.fromkeys(filled)
    for block in blocks:
        cells = block.cells
        for name in filled:
            # 一单的第一行可以在上一块里
            values = cells[name].fill_null(strategy="forward")
            values = values.fill_null(above[name]) if above[name] is not None else values
            above[name] = values[-1] if values.len() else above[name]
            cells = cells.with_columns(values)
        cells = cells.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in added)
        merged = pl.col("column").is_in(list(filled)) & pl.col("problem").str.starts_with(MERGED)
        yield replace(block, cells=cells, unread=block.unread.filter(~merged))
