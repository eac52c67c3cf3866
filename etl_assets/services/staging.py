"""临时表：一帧放进去，SQL 从那里读；一个数据库连接只建一次。"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import polars as pl
import psycopg
import sqlalchemy as sa
from sqlalchemy.util import LRUCache

from etl_assets.core.database_sync import note_staged
from etl_assets.core.interruption import check_interruption
from etl_assets.services import few_rows
from etl_assets.services.copy_out import driver_of

_WRITE_CHUNK_ROWS = 50_000
_stagings: LRUCache[Any, tuple[sa.Table, str]] = LRUCache(200)
_staged_in: WeakKeyDictionary[sa.RootTransaction, dict[str, bool]] = WeakKeyDictionary()


def stage_frame(connection: sa.Connection, frame: pl.DataFrame, *, name: str, like: sa.Table) -> sa.Table:
    """把一帧放进一张临时表，列类型照抄 `like` 的同名列。几行的与建表一起发，一次往返；多的 COPY。"""
    return stage_columns(connection, frame, name=name, columns=[sa.Column(column, like.c[column].type) for column in frame.columns])


def stage_columns(connection: sa.Connection, frame: pl.DataFrame, *, name: str, columns: Sequence[sa.Column[Any]]) -> sa.Table:
    """同 `stage_frame`，列是给定的；帧里没有的列取缺省值。"""
    if frame.height * frame.width > few_rows.FEW_CELLS:
        staging = create_staging(connection, name, columns)
        copy_into(connection, frame, staging)
        return staging
    staging, emptied = take_staging(connection, name, columns)
    note_staged(connection, int(frame.estimated_size()))
    with psycopg.ClientCursor(driver_of(connection)) as cursor:
        cursor.execute((emptied + _insert_few(cursor, frame, staging, connection.dialect.identifier_preparer)).encode())
    return staging


def _insert_few(
    cursor: psycopg.ClientCursor[Any], frame: pl.DataFrame, staging: sa.Table, preparer: sa.sql.compiler.IdentifierPreparer
) -> str:
    """接在建表后面的 INSERT；没有行就不必。一条消息装几条语句时带不了参数，所以由驱动在这一边绑定。"""
    if frame.is_empty():
        return ""
    row = f"({', '.join(['%s'] * frame.width)})"
    values = ", ".join(cursor.mogrify(row, cells) for cells in frame.iter_rows())
    names = ", ".join(map(preparer.quote, frame.columns))
    return f"; INSERT INTO {preparer.format_table(staging)} ({names}) VALUES {values}"  # noqa: S608  # 引用过的标识符与驱动绑定的值


def create_staging(connection: sa.Connection, name: str, columns: Sequence[sa.Column[Any]]) -> sa.Table:
    """一张空的临时表，在这个事务里用；用完又要用同样的一张，先 `release_staging`。

    每个运行都要同样的几张，所以一个数据库连接只建一次：建一张要写十几行系统表，一毫秒多。上次留下的行在这里清掉：
    ON COMMIT DELETE ROWS 不论用没用过，每次提交都清空全部临时表，一张四分之一毫秒。
    名字带着定义的散列，同名而列不同的不会碰在一起。
    """
    table, emptied = take_staging(connection, name, columns)
    driver_of(connection).execute(emptied.encode(), prepare=False)  # 几条语句一次往返，所以不能预备
    return table


def take_staging(connection: sa.Connection, name: str, columns: Sequence[sa.Column[Any]]) -> tuple[sa.Table, str]:
    """同 create_staging，给要与别的一起发的：这张临时表，与建它、清空它的语句。"""
    key = (name, *[(column.name, repr(column.type), _default(column)) for column in columns])
    if key not in _stagings:  # 定义与 DDL 也只算一次
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        table = sa.Table(f"{name}_{digest}", sa.MetaData(), *columns, prefixes=["TEMPORARY"])
        create = sa.schema.CreateTable(table, if_not_exists=True).compile(dialect=connection.dialect)
        _stagings[key] = table, str(create)
    table, ddl = _stagings[key]
    used = _used_stagings(connection)
    quoted = connection.dialect.identifier_preparer.format_table(table)
    check_interruption()
    if not used.get(table.name, True):
        raise ValueError(f"staging table {table.name} is in use in this transaction")
    # 别的运行留下的行不多，删比 TRUNCATE 快；多了，连接还回去时就扔掉（note_staged）。自己用过的可能很多
    clear = "TRUNCATE" if table.name in used else "DELETE FROM"
    used[table.name] = False
    return table, f"{ddl}; {clear} {quoted}"


def release_staging(connection: sa.Connection, staging: sa.Table) -> None:
    """用完了；这个事务里还能再要一张同样的空表。"""
    _used_stagings(connection)[staging.name] = True


def analyze_staging(connection: sa.Connection, staging: sa.Table) -> None:
    """给规划器这张临时表的统计：自动的 ANALYZE 看不见临时表。"""
    connection.exec_driver_sql(analysis(connection, staging))


def analysis(connection: sa.Connection, staging: sa.Table) -> str:
    """`analyze_staging` 的语句，给要与别的一起发的。"""
    return f"ANALYZE {connection.dialect.identifier_preparer.format_table(staging)}"


def sized(staging: sa.Table) -> sa.Subquery:
    """暂存表，行数由参数 rows 说明：没有统计的临时表，规划器当它有上千行，宁可把另一边整个读一遍。"""
    return sa.select(staging).limit(sa.bindparam("rows", type_=sa.BigInteger)).subquery(staging.name)


def _used_stagings(connection: sa.Connection) -> dict[str, bool]:
    """这个事务用过的临时表 → 用完了没有。"""
    transaction = connection.get_transaction()
    if transaction is None:
        raise ValueError("staging tables live in a transaction: begin one first")
    return _staged_in.setdefault(transaction, {})


def _default(column: sa.Column[Any]) -> str | None:
    default = column.server_default
    return default.arg.text if isinstance(default, sa.DefaultClause) and isinstance(default.arg, sa.TextClause) else None


def copy_into(connection: sa.Connection, frame: pl.DataFrame, table: sa.Table) -> None:
    """COPY 一帧到已有的表；NUL 字符与类型不符由 PostgreSQL 拒绝。"""
    preparer = connection.dialect.identifier_preparer
    names = ", ".join(preparer.quote(name) for name in frame.columns)
    check_interruption()
    note_staged(connection, int(frame.estimated_size()))
    statement = f"COPY {preparer.format_table(table)} ({names}) FROM STDIN (FORMAT csv)"
    with driver_of(connection).cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for part in frame.iter_slices(_WRITE_CHUNK_ROWS):
            copy.write(_format(part))


def _format(frame: pl.DataFrame) -> bytes | memoryview:
    if frame.height * frame.width <= few_rows.FEW_CELLS:
        return few_rows.encode(frame)
    buffer = io.BytesIO()
    frame.write_csv(buffer, include_header=False)
    return buffer.getbuffer()
