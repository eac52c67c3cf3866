"""给一个没见过的文件起草配置：看表头与值提议各列，写成带说明的 TOML，再真的读一遍。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from bridge.imports.choosing import Opened, open_file
from bridge.imports.files.cells import Source
from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.orders.proposals import propose_columns
from bridge.imports.reading import Reading
from bridge.imports.rules.errors import ImportFileError, ProfileError
from bridge.imports.rules.problems import BadRows
from bridge.imports.rules.profile import NEEDED_TARGETS, TARGETS, FileFormat, parse_profile, shipped_profiles
from bridge.imports.rules.toml import to_toml

_WITHOUT = {
    "order_type": "every order counts as BULK",
    "order_status": "stored as unknown",
    "amount": "stored as 0",
    "quantity": "stored as 1",
}


@dataclass(frozen=True)
class Draft:
    """:param problem: 照它导入会怎样不成；None 是成。"""

    text: str
    problem: str | None


def draft_profile(path: Path, *, shop: str | None, time_zone: str) -> Draft:
    """:raises ImportFileError: 文件本身不能读。"""
    opened = open_file(path, FileFormat(), None, choose=True)
    text, missing = _copy_shipped(opened, path, shop) if opened.profile else _write(opened.source, path, shop)
    if missing:
        return Draft(
            text,
            f"nothing in the file looks like {', '.join(missing)}"
            + (": give --shop NAME" if missing == ["shop"] else ""),
        )
    return Draft(text, _try(text, path, time_zone))


def _copy_shipped(opened: Opened, path: Path, shop: str | None) -> tuple[str, list[str]]:
    """平台的导出：它的配置已经随包，抄一份，写上店名。"""
    profile = opened.profile
    assert profile is not None  # noqa: S101  # 只在认出来时调用
    shipped = shipped_profiles()[profile.name].read_text(encoding="utf-8")
    head = f"# A copy of the shipped profile {profile.name}, which `etl import {_in_one_line(path.name)}` chooses by itself.\n"
    mapped = profile.orders.shop
    named = mapped is not None and (mapped.column is None or "shop" in _mapped(opened))
    if shop is not None:
        lines = [line for line in shipped.splitlines(keepends=True) if not line.startswith("shop = ")]
        shipped = "".join(lines).replace("[orders]\n", f"[orders]\nshop = {{ constant = {to_toml(shop)} }}\n", 1)
    return head + shipped, [] if shop is not None or named else ["shop"]


def _in_one_line(name: str) -> str:
    """注释里的文件名；文件名里也可以有换行。"""
    return "".join(character if character.isprintable() else " " for character in name)


def _mapped(opened: Opened) -> Mapping[str, object]:
    try:
        return map_columns(opened.source, opened.profile, overrides={}, shop=None).targets
    except ImportFileError:
        return {}


def _write(source: Source, path: Path, shop: str | None) -> tuple[str, list[str]]:
    """各列的提议，与一个也找不到又不能没有的。"""
    proposed = propose_columns(source)
    cells = pl.concat([block.cells for block in source.reread()]) if proposed else pl.DataFrame()
    by = proposed.get("order_id")
    several = by is not None and bool(cells[by].drop_nulls().is_duplicated().any())
    lines = [
        f"# For files such as {_in_one_line(path.name)}, read as {source.shape}. Keys: docs/profiles.md.",
        "# Proposed from the headers and the values: check it, then `etl import FILE --profile THIS_FILE`.",
        "",
    ]
    if several:
        lines += [
            f"# Several lines share one {by!r}: they become one order.",
            "[group]",
            f"by = [{to_toml(str(by))}]",
            "",
        ]
    lines.append("[orders]")
    missing: list[str] = []
    for name in TARGETS:
        if name == "shop" and shop is not None:
            lines.append(f"shop = {{ constant = {to_toml(shop)} }}")
        elif name in proposed:
            how = _aggregate(cells, str(by), proposed[name], name) if several else ""
            lines.append(f"{name} = {{ column = {to_toml(proposed[name])}{how} }} # {_example(cells, proposed[name])}")
        elif name == "shop" or name in NEEDED_TARGETS:
            missing.append(name)
            lines.append(f'# {name} = {{ column = "…" }} # nothing looks like it; or {{ constant = "…" }}')
        else:
            lines.append(f'# {name} = {{ column = "…" }} # nothing looks like it: {_WITHOUT[name]}')
    return "\n".join(lines) + "\n", missing


def _aggregate(cells: pl.DataFrame, by: str, column: str, name: str) -> str:
    """件数总是每行的；金额在每单里都一样的是整单的，否则是每行的。"""
    if name not in ("amount", "quantity"):
        return ""
    values = cells.group_by(by).agg(pl.col(column).drop_nulls().n_unique().alias("values"))
    each = name == "quantity" or bool((values["values"] > 1).any())
    return ', aggregate = "sum"' if each else ""


def _example(cells: pl.DataFrame, column: str) -> str:
    value = next(iter(cells[column].drop_nulls().head(1)), None)
    return f"such as {to_toml(value[:40])}" if value else "empty in this file"


def _try(text: str, path: Path, time_zone: str) -> str | None:
    try:
        profile = parse_profile(text, path.with_suffix(".toml"))
        source = open_source(path, profile.file)
        builder = OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), time_zone)
        with BadRows(path, write=False) as bad_rows:
            for _ in Reading(builder, bad_rows, skip_bad_rows=False, on_progress=None).orders():
                pass
    except (ImportFileError, ProfileError) as error:
        return str(error)
    return None
