"""COPY 的语句经 SQLAlchemy 的编译缓存（它没有公开的入口）：第二次不再编译，参数换成新的。"""

from __future__ import annotations

from typing import cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from etl_assets.services import vectorized_queries


class FakeConnection:
    dialect: sa.Dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


def test_same_statement_with_other_values_is_compiled_once() -> None:
    connection = cast("sa.Connection", FakeConnection())
    table = sa.table("t", sa.column("a", sa.Integer))
    vectorized_queries._compiled.clear()
    first = vectorized_queries._compile(connection, sa.select(table.c.a).where(table.c.a > 1))
    second = vectorized_queries._compile(connection, sa.select(table.c.a).where(table.c.a > 2))
    assert first[0] == second[0]
    assert (list(first[1] or {}), list((first[1] or {}).values()), list((second[1] or {}).values())) == (["a_1"], [1], [2])
    assert len(vectorized_queries._compiled) == 1


def test_percent_is_undoubled_only_without_parameters() -> None:
    connection = cast("sa.Connection", FakeConnection())
    table = sa.table("t", sa.column("a", sa.Integer))
    half = table.c.a % sa.literal_column("2")
    assert "t.a % 2" in vectorized_queries._compile(connection, sa.select(half))[0]
    assert "t.a %% 2" in vectorized_queries._compile(connection, sa.select(half).where(table.c.a > 1))[0]
