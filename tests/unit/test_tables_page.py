"""docs/tables.md：应用的四张只读的表，每一列都在，类型、不读的列、拒收的规则都对；两种语言一样。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from etl_assets.core.tables import DIALECT, application
from etl_assets.services import table_contract
from etl_assets.services.raw_rows import judge

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"tables.md": ("not read", "primary key", "unique"), "tables.zh-CN.md": ("不读", "主键", "唯一")}
SHORT = {"timestamp with time zone": "timestamptz"}


def read_page(page: str) -> dict[str, dict[str, str]]:
    """每张表的各列，与类型那一格。"""
    sections = re.split(r"^## ", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.split("\n", 1)[0]: dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", section, re.MULTILINE))
        for section in sections
    }


def type_cell(column: sa.Column[object], words: tuple[str, str, str]) -> str:
    not_read, primary, unique = words
    name = str(column.type.compile(DIALECT)).lower().replace(", ", ",")
    told = SHORT.get(name, name) + (" identity" if column.identity is not None else "")
    comma = "，" if primary == "主键" else ", "
    told += f"{comma}{primary}" if column.primary_key else f"{comma}{unique}" if column.unique else ""
    return told + (f"{comma}*{not_read}*" if column.name in table_contract._NOT_READ else "")


@pytest.mark.parametrize("page", PAGES)
def test_every_column_of_the_tables_is_on_the_page_with_its_type(page: str) -> None:
    expected = {
        table.name: {column.name: type_cell(column, PAGES[page]) for column in table.columns}
        for table in application.tables.values()
    }
    assert read_page(page) == expected


@pytest.mark.parametrize("page", PAGES)
def test_every_rule_by_which_rows_are_rejected_is_on_the_page(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    source = Path(judge.__code__.co_filename).read_text(encoding="utf-8")
    rules = set(re.findall(r'"((?:missing|unknown|bad|outside|negative|text)_[a-z_]+)"', source)) - {"unknown_type"}
    assert {"missing_order_id", "outside_partitions", "text_too_long"} <= rules
    assert {rule for rule in rules if f"`{rule}`" not in text} == set()
