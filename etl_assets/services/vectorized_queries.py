"""Polars 与 PostgreSQL 之间的整批读写：COPY 读出（在 copy_out.py），放进临时表，一条集合语句写进目标表、只写新的或变了的行。

所有函数都收一个 SQLAlchemy Connection，在调用者的事务里工作；SQL 语句数与行数无关。
一个数据库连接的临时表只建一次。
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from operator import add
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
from etl_assets.services.copy_out import read_batches as read_batches
from etl_assets.services.copy_out import read_frame as read_frame
from etl_assets.services.copy_out import reading_ahead as reading_ahead

_WRITE_CHUNK_ROWS = 50_000
_stagings: LRUCache[Any, tuple[sa.Table, str]] = LRUCache(200)
# 以事务为键：事务一结束，谁用着什么就一起忘掉，回滚了的也不会留下“正用着”
_staged_in: WeakKeyDictionary[sa.RootTransaction, dict[str, bool]] = WeakKeyDictionary()


def stage_frame(connection: sa.Connection, frame: pl.DataFrame, *, name: str, like: sa.Table) -> sa.Table:
    """把一帧放进一张临时表，列类型照抄 `like` 的同名列。几行的与建表一起发，一次往返；多的 COPY。"""
    return stage_columns(
        connection, frame, name=name, columns=[sa.Column(column, like.c[column].type) for column in frame.columns]
    )


def stage_columns(
    connection: sa.Connection, frame: pl.DataFrame, *, name: str, columns: Sequence[sa.Column[Any]]
) -> sa.Table:
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
    cursor: psycopg.ClientCursor[Any],
    frame: pl.DataFrame,
    staging: sa.Table,
    preparer: sa.sql.compiler.IdentifierPreparer,
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


def analysis(connection: sa.Connection, staging: sa.Table) -> str:
    """语句：给规划器这张临时表的统计，自动的 ANALYZE 看不见临时表。"""
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
    return (
        default.arg.text if isinstance(default, sa.DefaultClause) and isinstance(default.arg, sa.TextClause) else None
    )


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


@dataclass(frozen=True)
class WriteCounts:
    """rows 是算出的行数；其余是真正写下的，没有变化的行不计。"""

    rows: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0

    def __add__(self, other: WriteCounts) -> WriteCounts:
        return WriteCounts(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Upsert:
    """怎样把一帧写进一张表；是模块里的常量，所以按身份比较。

    :param key: 冲突键，帧内必须唯一。
    :param insert_only: 只在插入时写、更新时保留旧值的列（旧系统的 id）。
    :param protected: 列 → SQL 条件（以 `{row}` 指现有行）；条件成立时现有值不变，也不算有变化。
        条件对加锁后的最新行求值，所以读与写之间别人提交的改动不会被覆盖。人也写的表才有：先插入，再锁住要改的，
        有一行被人锁着就报错，从不锁着几行去等（见 people.give_way）。
    :param touch: 行有变化时写成 now() 的时间列。
    """

    key: Sequence[str]
    insert_only: Sequence[str] = ()
    protected: Mapping[str, str] = field(default_factory=dict)
    touch: str | None = None


def upsert_staged(
    connection: sa.Connection, staging: sa.Table, table: sa.Table, how: Upsert, *, staged_rows: int
) -> WriteCounts:
    """把暂存表写进目标表：只写新的或变了的行，其余不碰；目标表没有的列不写。

    不用 ON CONFLICT：它给每一行加锁、多写一条 WAL（1M 行慢三成）。同样的键别的运行不会同时写，锁隔开了它们；
    别的系统若恰好插进同一个键，唯一约束报错，整个事务由 retry_conflicts 重来。
    条件与新值对加锁之后的最新行求值，所以读与写之间别人提交的改动不会被盖掉。

    :param staged_rows: 暂存表至多有这么多行，见 `sized`。
    """
    statement = _upsert_statement(staging, table, how, connection.dialect.identifier_preparer)
    inserted, updated = connection.exec_driver_sql(statement, {"rows": staged_rows}).one()
    return WriteCounts(inserted=inserted, updated=updated)


def upsert_text(connection: sa.Connection, staging: sa.Table, table: sa.Table, how: Upsert, *, staged_rows: int) -> str:
    """`upsert_staged` 的语句，给要与别的一起发的；一行：插入了几行，更新了几行。"""
    statement = _upsert_statement(staging, table, how, connection.dialect.identifier_preparer)
    return psycopg.ClientCursor(driver_of(connection)).mogrify(statement, {"rows": staged_rows})


@lru_cache(maxsize=64)
def _upsert_statement(
    staging: sa.Table, table: sa.Table, how: Upsert, preparer: sa.sql.compiler.IdentifierPreparer
) -> str:
    """每个运行都要同样的几条：拼一次就留着。"""
    quote, target = preparer.quote, preparer.format_table(table)
    stage = f"(SELECT * FROM {preparer.format_table(staging)} LIMIT %(rows)s)"  # noqa: S608  # 只拼接引用过的标识符
    columns = [column.name for column in staging.columns if column.name in table.columns]
    values = [name for name in columns if name not in how.key and name not in how.insert_only]

    def new_value(name: str) -> str:
        column = quote(name)
        if name not in how.protected:
            return f"s.{column}"
        return f"CASE WHEN {how.protected[name].format(row='t')} THEN t.{column} ELSE s.{column} END"

    same_key = " AND ".join(f"t.{quote(name)} = s.{quote(name)}" for name in how.key)
    existing_row = ", ".join(f"t.{quote(name)}" for name in values)
    new_row = ", ".join(map(new_value, values))
    assignments = [f"{quote(name)} = {new_value(name)}" for name in values]
    assignments += [f"{quote(how.touch)} = now()"] if how.touch else []
    changed = f"{same_key} AND ({existing_row}) IS DISTINCT FROM ({new_row})"
    names, key = ", ".join(map(quote, columns)), ", ".join(f"s.{quote(name)}" for name in how.key)
    # 等得到别人的只有插入（同一个键）：那时还没有锁住谁
    lock = f"""
        ), locked AS (
            SELECT {key} FROM {target} t, {stage} s, (SELECT count(*) FROM inserted) AS first
            WHERE {changed}
            FOR NO KEY UPDATE OF t NOWAIT"""  # noqa: S608  # 只拼接引用过的标识符
    is_locked = f" AND ({key}) IN (TABLE locked)"
    return f"""
        WITH inserted AS (
            INSERT INTO {target} ({names})
            SELECT {", ".join(f"s.{quote(name)}" for name in columns)}
            FROM {stage} s
            WHERE NOT EXISTS (SELECT FROM {target} t WHERE {same_key})
            ORDER BY {key}
            RETURNING 1{lock if how.protected else ""}
        ), updated AS (
            UPDATE {target} t SET {", ".join(assignments)}
            FROM {stage} s
            WHERE {changed}{is_locked if how.protected else ""}
            RETURNING 1
        )
        SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM updated)"""  # noqa: S608  # 只拼接引用过的标识符


def upsert_frame(connection: sa.Connection, frame: pl.DataFrame, table: sa.Table, how: Upsert) -> WriteCounts:
    """暂存一帧并写进目标表。"""
    staging = stage_frame(connection, frame, name=f"staged_{table.name}", like=table)
    counts = upsert_staged(connection, staging, table, how, staged_rows=frame.height)
    release_staging(connection, staging)
    return counts + WriteCounts(rows=frame.height)
