"""表的约定：ETL 写的与读的表在写任何东西之前核对，不符就拒绝，并点名到列。"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_description import ApplicationTable
from etl_assets.core.asset_folders import descriptions
from etl_assets.core.errors import TableContractError, TableDeviation
from etl_assets.core.tables import (
    APPLICATION_SCHEMA,
    DIALECT,
    import_tasks,
    order_type_mappings,
    raw_orders,
    shop_configs,
    target_tables,
)

# 只读的表里 ETL 不看的列：是什么都行，没有也行；结果表的见各资产的 ApplicationTable
_NOT_READ = frozenset({"source_name", "row_count", "created_at", "extra", "platform"})
_TIMESTAMPS = frozenset({"created_at", "updated_at"})
# 看不见的行像是删掉了。policy 写着什么都看得见、什么都写得了的不算；别的条件，看不出它藏不藏
HIDES_ROWS = """row_security_active(c.oid) AND NOT (
        SELECT coalesce(bool_or(p.polcmd = '*' AND pg_get_expr(p.polqual, p.polrelid) = 'true'), false)
               AND bool_and(p.polpermissive)
        FROM pg_catalog.pg_policy p
        WHERE p.polrelid = c.oid
              AND (p.polroles = '{0}' OR EXISTS (SELECT FROM unnest(p.polroles) AS r WHERE pg_has_role(r, 'USAGE')))
    )"""
"""SQL：我们的角色也许看不见 c 的全部行。"""
# 一张表一行；键是 ON CONFLICT 认得的那些唯一索引各自的列
READ_CATALOG = sa.text(
    f"""
    SELECT n.nspname || '.' || c.relname, c.relkind IN ('r', 'p'),
           (
               SELECT json_object_agg(
                          a.attname,
                          json_build_array(
                              pg_catalog.format_type(a.atttypid, a.atttypmod),
                              a.attnotnull,
                              a.atthasdef OR a.attidentity <> '',
                              a.attgenerated <> '' OR a.attidentity = 'a'
                          )
                      )::text
               FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
           ),
           (
               SELECT json_agg(
                          (
                              SELECT json_agg(a.attname)
                              FROM pg_catalog.pg_attribute a
                              WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
                          )
                      )::text
               FROM pg_catalog.pg_index i
               WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
                     AND i.indpred IS NULL AND i.indexprs IS NULL
           ),
           {HIDES_ROWS}
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname IN (:contract_target, :application)
          AND c.relname = ANY (CAST(:contract_tables AS text[]))
    """  # noqa: S608  # 只拼了上面的常量
)
_SOURCES = (raw_orders, import_tasks, shop_configs, order_type_mappings)

_CatalogRow = tuple[str, bool, str | None, str | None, bool]
_HIDING = ("hiding rows from our role (row-level security)", "seen whole (BYPASSRLS, or a policy FOR ALL USING (true))")


@dataclass(frozen=True)
class _Column:
    """库里的一列。"""

    type_name: str
    is_not_null: bool
    has_default: bool
    is_computed: bool


@dataclass(frozen=True)
class _Relation:
    """库里的一张表，或没有键的视图、外部表。"""

    is_table: bool
    columns: Mapping[str, _Column]
    keys: Set[frozenset[str]]
    hides_rows: bool


def assert_table_contract(connection: sa.Connection, target: str) -> None:
    """核对目标 schema 的结果表与 ETL 读的四张表。

    一条语句，一毫秒多，所以每个运行都查：温着的工人活着的时候，表也会被人改。
    目标表里应用自己的列不算不符，除非它逼 INSERT 给值；读的表可以是视图，那就不查键。

    :raises TableContractError: 点名每一处不符；什么也没写。
    """
    judge_catalog(target, connection.execute(READ_CATALOG, catalog_parameters(target)).tuples().all())


def catalog_parameters(target: str) -> dict[str, object]:
    """`READ_CATALOG` 的参数，给要与别的一起发的；它的行交给 `judge_catalog`。"""
    names = [table.name for table in (*_SOURCES, *target_tables(target).of_asset.values())]
    return {"contract_target": target, "application": APPLICATION_SCHEMA, "contract_tables": names}


def judge_catalog(target: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """:raises TableContractError: 点名每一处不符。"""
    catalog = frozenset(tuple(row) for row in rows)
    if deviations := _find_deviations(target, catalog):
        raise TableContractError(deviations)


@lru_cache(maxsize=8)
def _find_deviations(target: str, catalog: frozenset[_CatalogRow]) -> tuple[TableDeviation, ...]:
    """目录没有变，结论就没有变：缓存省下大半时间。"""
    found = {
        name: _Relation(
            is_table=is_table,
            columns={column: _Column(*facts) for column, facts in json.loads(columns or "{}").items()},
            keys={frozenset(key) for key in json.loads(keys or "[]")},
            hides_rows=hides_rows,
        )
        for name, is_table, columns, keys, hides_rows in catalog
    }
    tables = target_tables(target).of_asset
    written = (
        _deviations_of_target(tables[asset], found.get(tables[asset].fullname), description.application_table)
        for asset, description in descriptions().items()
    )
    read = (_deviations_of_source(table, found.get(table.fullname)) for table in _SOURCES)
    return tuple(chain.from_iterable((*written, *read)))


def _deviations_of_target(
    table: sa.Table, found: _Relation | None, given: ApplicationTable | None
) -> Iterator[TableDeviation]:
    """列、键，以及会让 INSERT 失败的列。"""
    if found is None:
        yield TableDeviation(table.fullname, "missing", "a table" if given else "made by `etl init-db`")
        return
    allowed = given or ApplicationTable()
    not_inserted = allowed.not_written | _TIMESTAMPS
    longest = {
        column.name: 0.0 if column.name in not_inserted else allowed.longest_text.get(column.name, math.inf)
        for column in table.columns
    }
    yield from _hidden_rows(table, found)
    yield from _wrong_columns(table.columns, found, longest)
    yield from _missing_keys(table, found)
    for name, column in found.columns.items():
        place = f"{table.fullname}.{name}"
        if name not in table.columns or name in not_inserted:
            if column.is_not_null and not column.has_default:
                yield TableDeviation(place, "NOT NULL without a default", "nullable or have a default")
        elif column.is_computed:
            yield TableDeviation(place, "generated by PostgreSQL", "writable")
        elif column.is_not_null and name in allowed.written_as_null:
            yield TableDeviation(place, "NOT NULL", "nullable")


def _deviations_of_source(table: sa.Table, found: _Relation | None) -> Iterator[TableDeviation]:
    """ETL 读的列；重复的键会让一行变成几行。"""
    if found is None:
        yield TableDeviation(table.fullname, "missing", "a table or a view")
        return
    yield from _hidden_rows(table, found)
    yield from _wrong_columns([column for column in table.columns if column.name not in _NOT_READ], found, {})
    if found.is_table:
        yield from _missing_keys(table, found)


def _hidden_rows(table: sa.Table, found: _Relation) -> Iterator[TableDeviation]:
    if found.hides_rows:
        yield TableDeviation(table.fullname, *_HIDING)


def _wrong_columns(
    wanted: Iterable[sa.Column[Any]], found: _Relation, longest: Mapping[str, float]
) -> Iterator[TableDeviation]:
    """:param longest: 文字列 → ETL 写的最长字数；不在其中的只读不写。够长的 varchar(n) 与 text 一样好，太短的会写到半路才失败。"""
    for column in wanted:
        type_name = column.type.compile(dialect=DIALECT).lower().replace(", ", ",")  # 像 format_type 那样写
        existing = found.columns.get(column.name)
        if existing is None:
            yield TableDeviation(f"{column.table.fullname}.{column.name}", "missing", type_name)
        elif existing.type_name != type_name and not _is_roomy_varchar(
            column, existing.type_name, longest.get(column.name, 0)
        ):
            yield TableDeviation(f"{column.table.fullname}.{column.name}", existing.type_name, type_name)


def _missing_keys(table: sa.Table, found: _Relation) -> Iterator[TableDeviation]:
    for constraint in table.constraints:
        if isinstance(constraint, sa.PrimaryKeyConstraint | sa.UniqueConstraint):
            names = constraint.columns.keys()
            if frozenset(names) not in found.keys:
                yield TableDeviation(f"{table.fullname} ({', '.join(names)})", "not a unique key", "one")


def _is_roomy_varchar(column: sa.Column[Any], type_name: str, longest: float) -> bool:
    """能当 text 用的 varchar：装得下 ETL 会写的一切。"""
    varchar = re.fullmatch(r"character varying(?:\((\d+)\))?", type_name)
    if varchar is None or not isinstance(column.type, sa.Text):
        return False
    limit = int(varchar[1]) if varchar[1] else math.inf
    return limit >= longest
