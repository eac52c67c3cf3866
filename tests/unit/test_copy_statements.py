"""COPY 的语句：同一个语句只编译一次，值每次另给；没有值时 %% 还原成 %。"""

from __future__ import annotations

from typing import cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from etl_assets.core.database_sync import compile_once
from etl_assets.services import copy_out


class FakeConnection:
    dialect: sa.Dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


CONNECTION = cast("sa.Connection", FakeConnection())
TABLE = sa.table("t", sa.column("a", sa.Integer))


def test_statement_is_compiled_once_and_its_values_are_given_each_time() -> None:
    before = compile_once.cache_info().misses
    statement = sa.select(TABLE.c.a).where(TABLE.c.a > sa.bindparam("least", type_=sa.Integer), TABLE.c.a != 7)
    compiled = [copy_out._compile(CONNECTION, statement, {"least": least}) for least in (1, 2)]
    assert compiled[0][0] == compiled[1][0]
    assert [parameters for _, parameters in compiled] == [{"least": 1, "a_1": 7}, {"least": 2, "a_1": 7}]
    assert compile_once.cache_info().misses == before + 1


def test_percent_is_undoubled_only_without_parameters() -> None:
    half = TABLE.c.a % sa.literal_column("2")
    assert "t.a % 2" in copy_out._compile(CONNECTION, sa.select(half), {})[0]
    assert "t.a %% 2" in copy_out._compile(CONNECTION, sa.select(half).where(TABLE.c.a > 1), {})[0]
