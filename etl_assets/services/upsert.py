"""暂存表写进目标表：一条集合语句，只写新的或变了的行。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import polars as pl
import psycopg
import sqlalchemy as sa

from etl_assets.services.copy_out import driver_of
from etl_assets.services.staging import release_staging, stage_frame


@dataclass(frozen=True, kw_only=True)
class WriteCounts:
    """rows 是算出的行数；其余是真正写下的，没有变化的行不计。"""

    rows: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0

    def __add__(self, other: WriteCounts) -> WriteCounts:
        return WriteCounts(
            rows=self.rows + other.rows,
            inserted=self.inserted + other.inserted,
            updated=self.updated + other.updated,
            deleted=self.deleted + other.deleted,
        )


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


def upsert_staged(connection: sa.Connection, staging: sa.Table, table: sa.Table, how: Upsert, *, staged_rows: int) -> WriteCounts:
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
def _upsert_statement(staging: sa.Table, table: sa.Table, how: Upsert, preparer: sa.sql.compiler.IdentifierPreparer) -> str:
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
