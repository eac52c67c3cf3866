"""比较的一侧：某个 schema 里的一张结果表（或视图），整理成带业务键、两边可以直接相比的行。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.errors import PermanentError
from etl_assets.core.tables import APPLICATION_SCHEMA, TargetTables, own_columns, target_tables

# 每行都有、从不为 NULL 的布尔列：FULL JOIN 之后它为 NULL，就是这一侧没有这一行
IN_SCOPE = "in_scope"

# 查 schema、列与类型；没有表的 schema、没有列的表也各有一行。视图也算表：旧系统可以用视图摆成约定的样子
_READ_COLUMNS = sa.text("""
    SELECT n.nspname AS schema, c.relname AS table, a.attname AS column, t.typname AS type, t.typcategory AS category
    FROM pg_namespace n
    LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname = ANY(:tables)
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_type t ON t.oid = a.atttypid
    WHERE n.nspname = ANY(:schemas)
""")


class NotComparableError(PermanentError):
    """一侧缺 schema、表或列，或者列的类型没法相比。"""

    def __init__(self, place: str, problem: str, remedy: str) -> None:
        self.place = place
        self.problem = problem
        super().__init__(f"{place} {problem}: {remedy}")


@dataclass(frozen=True)
class Scope:
    """比哪些行：资产的 dated_by 在这个业务日或之后的。"""

    since: date
    timezone: str

    def includes(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        start: sa.ColumnElement[Any] = (
            sa.literal(self.since)
            if isinstance(column.type, sa.Date)
            else sa.func.timezone(self.timezone, sa.cast(f"{self.since} 00:00:00", sa.TIMESTAMP()))
        )
        # 不能是 NULL：FULL JOIN 之后，NULL 的意思是这一侧没有这一行
        return sa.func.coalesce(column >= start, sa.false())


@dataclass(frozen=True)
class _ColumnType:
    name: str
    category: str

    def wanted_instead(self, contract: sa.types.TypeEngine[Any]) -> str | None:
        """不会算错、不会报错就能当作约定的类型，是 None；类别 S 是各种文字，E 枚举，N 各种数。"""
        match contract:
            case sa.Text():
                fits, wanted = self.category in "SE", "text"
            case sa.Integer() | sa.Numeric():
                fits, wanted = self.category == "N", "a number"
            case sa.DateTime():
                # 不带时区的时刻指哪一刻，只有旧系统知道
                fits, wanted = self.name == "timestamptz", "timestamp with time zone"
            case sa.Date():
                fits, wanted = self.name == "date", "date"
            case _:
                fits, wanted = self.name == "uuid", "uuid"
        return None if fits else wanted


@dataclass(frozen=True)
class Catalog:
    """两个 schema 里实际有的列：(schema, 表) → 列 → 类型。"""

    columns: Mapping[tuple[str, str], Mapping[str, _ColumnType]]

    def require(self, table: sa.Table, columns: Sequence[sa.Column[Any]], *, can_ignore: bool) -> None:
        """表在，列齐，类型能比；否则一句话说缺什么。键的列不能不比。"""
        place = f"{table.schema}.{table.name}"
        found = self.columns.get((str(table.schema), table.name))
        if found is None:
            raise NotComparableError(
                f"table {place}", "does not exist", "create it, or choose other tables with --table"
            )
        missing = [column.name for column in columns if column.name not in found]
        if missing:
            raise NotComparableError(
                place, f"has no column {', '.join(missing)}", _remedy("add it (a view will do)", missing, can_ignore)
            )
        for column in columns:
            actual = found[column.name]
            if wanted := actual.wanted_instead(column.type):
                remedy = _remedy("convert it in a view", [column.name], can_ignore)
                raise NotComparableError(f"{place}.{column.name}", f"is {actual.name}, not {wanted}", remedy)


def read_catalog(connection: sa.Connection, schemas: Sequence[str]) -> Catalog:
    """查两个 schema；缺了哪个就说出来。"""
    parameters = {
        "schemas": list(schemas),
        "tables": [table.name for table in target_tables(APPLICATION_SCHEMA).of_asset.values()],
    }
    found: set[str] = set()
    columns: dict[tuple[str, str], dict[str, _ColumnType]] = {}
    for row in connection.execute(_READ_COLUMNS, parameters):
        found.add(row.schema)
        if row.table is not None:
            columns.setdefault((row.schema, row.table), {})[row.column] = _ColumnType(row.type, row.category)
    for schema in schemas:
        if schema not in found:
            raise NotComparableError(
                f"schema {schema!r}", "does not exist", "name a schema of the database of ETL_DATABASE_URL"
            )
    return Catalog(columns)


def business_key(asset: str) -> tuple[str, ...]:
    """按它认一行的列。"""
    return descriptions()[asset].key or tuple(
        target_tables(APPLICATION_SCHEMA).of_asset[asset].primary_key.columns.keys()
    )


def compared_columns(asset: str) -> list[sa.Column[Any]]:
    """一张表里相比的列：约定的列，除去键、created_at 与 updated_at。"""
    table = target_tables(APPLICATION_SCHEMA).of_asset[asset]
    return [column for column in own_columns(table) if column.name not in business_key(asset)]


def select_side(
    catalog: Catalog, schema: str, asset: str, *, columns: Sequence[str], scope: Scope | None
) -> sa.Select[Any]:
    """一侧的行：键、要比的列、IN_SCOPE。文字按码点比，不看列的排序规则。"""
    tables = target_tables(schema)
    table = tables.of_asset[asset]
    key, source = _key(catalog, tables, asset)
    compared = [table.c[column] for column in columns]
    dated_by = table.c[descriptions()[asset].dated_by]
    catalog.require(table, compared, can_ignore=True)
    if scope is not None:
        catalog.require(table, [dated_by], can_ignore=False)
    values = [_comparable(column).label(column.name) for column in compared]
    in_scope = sa.true() if scope is None else scope.includes(dated_by)
    return sa.select(
        *[part.label(label) for label, part in key.items()], *values, in_scope.label(IN_SCOPE)
    ).select_from(source)


def _remedy(first: str, columns: Sequence[str], can_ignore: bool) -> str:
    ignore = " ".join(f"--ignore {column}" for column in columns)
    return f"{first}, or leave it out with {ignore}" if can_ignore else first


def _key(catalog: Catalog, tables: TargetTables, asset: str) -> tuple[dict[str, sa.ColumnElement[Any]], sa.FromClause]:
    """键的各部分，与从哪里读。没有 customer_key 的客户、没有客户的行，以 customer_global_id 的文字为键。"""
    table, customers = tables.of_asset[asset], tables.customers
    names = business_key(asset)
    if "customer_key" not in names:
        catalog.require(table, [table.c[name] for name in names], can_ignore=False)
        return {name: _comparable(table.c[name]) for name in names}, table
    others = [name for name in names if name != "customer_key"]
    catalog.require(table, [table.c.customer_global_id, *(table.c[name] for name in others)], can_ignore=False)
    catalog.require(customers, [customers.c.customer_key, customers.c.customer_global_id], can_ignore=False)
    of_customer = sa.func.coalesce(_comparable(customers.c.customer_key), sa.cast(table.c.customer_global_id, sa.Text))
    key = {"customer_key": of_customer, **{name: _comparable(table.c[name]) for name in others}}
    if table is customers:
        return key, table
    return key, table.outerjoin(customers, customers.c.customer_global_id == table.c.customer_global_id)


def _comparable(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    match column.type:
        case sa.Text():
            return sa.cast(column, sa.Text).collate("C")
        case sa.Numeric():
            return sa.cast(column, sa.Numeric)  # double precision 与 numeric 相减会丢精度
        case _:
            return column
