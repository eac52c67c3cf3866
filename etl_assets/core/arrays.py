"""数组当作一张表：一条语句找或写许多行，参数的个数与行数无关。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.etl_tables import TARGET


def array(name: str, items: sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]]) -> sa.BindParameter[Any]:
    """语句里的一个数组参数。"""
    return sa.bindparam(name, type_=sa.ARRAY(items))


def unnest(name: str, **arrays: sa.BindParameter[Any]) -> sa.TableValuedAlias:
    """几个一样长的数组并成一张表，一个数组一列，列的类型是它的元素的。"""
    columns = [sa.column(column, array.type.item_type) for column, array in arrays.items()]  # type: ignore[attr-defined]  # 都是数组
    return sa.func.unnest(*arrays.values()).table_valued(*columns, name=name).render_derived()


def given_rows(table: sa.Table, names: Sequence[str]) -> sa.TableValuedAlias:
    """参数给出的许多行，像 table 的这几列；参数由 `in_arrays` 而来。"""
    arrays = {name: sa.bindparam(f"{table.name}_{name}", type_=sa.ARRAY(table.c[name].type)) for name in names}
    return unnest("given", **arrays)


def insert_given(table: sa.Table, names: Sequence[str]) -> pg.Insert:
    """语句：给 `TARGET` 插入 `given_rows`。"""
    return pg.insert(table).from_select(["target", *names], sa.select(TARGET, *given_rows(table, names).c))


def in_arrays(table: sa.Table, names: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, object]:
    """`given_rows` 的参数。"""
    return {f"{table.name}_{name}": [row[position] for row in rows] for position, name in enumerate(names)}
