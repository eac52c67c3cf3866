"""表的一页：应用的、结果的、ETL 自己的，每一列由 SQLAlchemy 的定义说出来。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.etl_tables import etl
from etl_assets.core.tables import APPLICATION_SCHEMA, DIALECT, application, target_tables
from handbook.markdown import code, page, table
from handbook.repository import Language
from handbook.written import is_written, written

_WORDS = {
    "title": {"en": "Tables", "zh-CN": "表"},
    "intro": {
        "en": "`etl init-db` creates what is missing. Tables of your application that exist are used as they are: every run "
        "compares them with what it expects; extra columns are fine when they are nullable or have a default.",
        "zh-CN": "缺的由 `etl init-db` 建。应用已有的表原样使用：每次运行先与它期望的核对；多出的列可以为空或有缺省值就行。",
    },
    "read": {"en": "Tables of the application, read", "zh-CN": "应用的表，只读"},
    "results": {
        "en": "Results, in `ETL_TARGET_SCHEMA`",
        "zh-CN": "结果，在 `ETL_TARGET_SCHEMA` 里",
    },
    "own": {"en": "The ETL's own, schema `etl`", "zh-CN": "ETL 自己的，schema `etl`"},
    "private": {
        "en": "They are ours and change with a version; read them, do not write them. A row belongs to the schema in `target`. "
        "The view `etl.accounting` has one row per import: `raw`, `loaded`, `superseded`, `rejected`, `waiting`.",
        "zh-CN": "它们是我们的，随版本改变；可以读，不要写。一行属于 `target` 里的那个 schema。视图 `etl.accounting` 一行一次导入："
        "`raw`、`loaded`、`superseded`、`rejected`、`waiting`。",
    },
    "column": {"en": "column", "zh-CN": "列"},
    "type": {"en": "type", "zh-CN": "类型"},
    "meaning": {"en": "meaning", "zh-CN": "意思"},
    "from": {"en": "computed from", "zh-CN": "由哪些列算出"},
    "key": {"en": "key", "zh-CN": "主键"},
    "required": {"en": "not null", "zh-CN": "非空"},
}


def tables_page(language: Language) -> str:
    words = {name: both[language] for name, both in _WORDS.items()}
    results = target_tables(APPLICATION_SCHEMA).of_asset
    read = [_section(each, {}, language, words) for each in application.tables.values()]
    made = [_section(each, descriptions()[asset].sources, language, words) for asset, each in results.items()]
    own = [_own_section(each, language, words) for each in etl.tables.values()]
    return page(
        words["title"],
        words["intro"],
        f"## {words['read']}",
        *read,
        f"## {words['results']}",
        *made,
        f"## {words['own']}",
        words["private"],
        *own,
    )


def _section(of: sa.Table, sources: Mapping[str, Sequence[str]], language: Language, words: dict[str, str]) -> str:
    names = ["column", "type", "meaning", *(["from"] if sources else [])]
    known = is_written("tables", of.name)
    rows = [
        [
            code(column.name),
            _type(column, words),
            written("columns", column.name, language, of=of.name) if known else "",
            *([", ".join(map(code, sources.get(column.name, ())))] if sources else []),
        ]
        for column in of.columns
    ]
    about = written("tables", of.name, language) if known else ""
    return "\n\n".join(filter(None, [f"### `{of.name}`", about, table([words[name] for name in names], rows)]))


def _own_section(of: sa.Table, language: Language, words: dict[str, str]) -> str:
    columns = ", ".join(f"`{column.name}` {_type(column, words)}" for column in of.columns)
    return f"### `etl.{of.name}`\n\n{written('tables', f'etl.{of.name}', language)}\n\n{columns}"


def _type(column: sa.Column[object], words: dict[str, str]) -> str:
    name = column.type.compile(dialect=DIALECT).lower().replace(" with time zone", "tz")
    marks = [words["key"]] if column.primary_key else [words["required"]] if not column.nullable else []
    return " ".join([name, *(f"({mark})" for mark in marks)])
