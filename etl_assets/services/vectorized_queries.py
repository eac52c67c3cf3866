"""Polars 与 PostgreSQL 之间的整批读写：COPY 读出、COPY 暂存、一条集合语句写入。

所有函数都收一个 SQLAlchemy Connection，在调用者的事务里工作；SQL 语句数与行数无关。
"""

from __future__ import annotations

import codecs
import hashlib
import io
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import polars as pl
import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlalchemy.util import LRUCache

from etl_assets.core.database_sync import note_staged
from etl_assets.core.interruption import check_interruption
from etl_assets.services import few_rows

_READ_CHUNK_BYTES = 16 << 20
_WRITE_CHUNK_ROWS = 50_000
_stagings: LRUCache[Any, tuple[sa.Table, str]] = LRUCache(200)
_compiled: LRUCache[sa.Select[Any], sa.Compiled] = LRUCache(200)
_staged_in: WeakKeyDictionary[sa.RootTransaction, dict[str, bool]] = WeakKeyDictionary()
Parameters = Mapping[str, object]
"""语句里 bindparam 的值。"""
_WAITING_INTERVAL_SECONDS = 0.3  # 小于 idle_in_transaction_session_timeout 的最小值 1 秒

_POLARS_TYPES: tuple[tuple[type[sa.types.TypeEngine[Any]], pl.DataType], ...] = (
    (sa.Float, pl.Float64()),  # Float 是 Numeric 的子类，必须在前
    (sa.Boolean, pl.Boolean()),
    (sa.SmallInteger, pl.Int16()),
    (sa.BigInteger, pl.Int64()),
    (sa.Integer, pl.Int32()),
    (sa.Date, pl.Date()),
    (sa.String, pl.String()),
    (sa.Uuid, pl.String()),
    (JSON, pl.String()),
    (JSONB, pl.String()),
)


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
        条件对加锁后的最新行求值，所以读与写之间别人提交的改动不会被覆盖。
    :param touch: 行有变化时写成 now() 的时间列。
    """

    key: Sequence[str]
    insert_only: Sequence[str] = ()
    protected: Mapping[str, str] = field(default_factory=dict)
    touch: str | None = None


def polars_type(sql_type: sa.types.TypeEngine[Any]) -> pl.DataType:
    """SQL 列类型对应的 Polars 类型；uuid 与 json 读成文本。"""
    if isinstance(sql_type, sa.Numeric) and not isinstance(sql_type, sa.Float):
        if sql_type.precision is None or sql_type.scale is None:
            raise TypeError("numeric without precision and scale: cast it in the query")
        return pl.Decimal(sql_type.precision, sql_type.scale)
    if isinstance(sql_type, sa.DateTime):
        return pl.Datetime("us", "UTC" if sql_type.timezone else None)
    for known, polars in _POLARS_TYPES:
        if isinstance(sql_type, known):
            return polars
    raise TypeError(f"no Polars type for {sql_type!r}")


def read_frame(connection: sa.Connection, statement: sa.Select[Any], parameters: Parameters = MappingProxyType({})) -> pl.DataFrame:
    """用 COPY 读出一个查询：每行一条记录，类型来自列，NULL 与空串不混。"""
    return pl.concat(read_batches(connection, statement, parameters))


def read_batches(
    connection: sa.Connection, statement: sa.Select[Any], parameters: Parameters = MappingProxyType({})
) -> Iterator[pl.DataFrame]:
    """同 read_frame，一批约 16 MB 文本；至少一批，可能是空的。读完之前连接不能作他用。"""
    schema = {column.name: polars_type(column.type) for column in statement.selected_columns}
    for chunk in _copy_out(connection, statement, parameters):
        yield _parse(chunk, schema)


@contextmanager
def reading_ahead(
    connection: sa.Connection,
    statement: sa.Select[Any],
    parameters: Parameters = MappingProxyType({}),
    *,
    while_waiting: Callable[[], object] | None = None,
) -> Iterator[Iterator[pl.DataFrame]]:
    """同 read_batches，但由一个线程先读着下一批：服务器发送时，调用者处理上一批。

    离开 with 时没读完的查询被取消；出来以前连接归那个线程用。

    :param while_waiting: 等下一批时每隔一会儿调用一次，好让别的连接上的事务不因为闲着而被服务器切断。
    """
    schema = {column.name: polars_type(column.type) for column in statement.selected_columns}
    chunks: queue.Queue[io.BytesIO | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    source, read_already = _copy_out(connection, statement, parameters, stopped), []
    if while_waiting is None:  # 没有别的事务要照看，头一批就在这里读；多半只有这一批，不必起线程
        read_already.append(next(source))
        if read_already[0].tell() < _READ_CHUNK_BYTES and next(source, None) is None:
            yield iter([_parse(read_already[0], schema)])
            return

    def put(item: io.BytesIO | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                chunks.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for chunk in chain(read_already, source):
                put(chunk)
            put(None)
        except BaseException as error:  # noqa: BLE001  # 交给读的一方抛出
            put(error)

    def take() -> io.BytesIO | BaseException | None:
        while while_waiting is not None:
            with suppress(queue.Empty):
                return chunks.get(timeout=_WAITING_INTERVAL_SECONDS)
            while_waiting()
        return chunks.get()

    def batches() -> Iterator[pl.DataFrame]:
        while (chunk := take()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield _parse(chunk, schema)

    reader = threading.Thread(target=read, name="read-ahead", daemon=True)
    reader.start()
    try:
        yield batches()
    finally:
        stopped.set()
        reader.join()


def stage_frame(connection: sa.Connection, frame: pl.DataFrame, *, name: str, like: sa.Table) -> sa.Table:
    """把一帧 COPY 进一张临时表，列类型照抄 `like` 的同名列。"""
    columns = [sa.Column(column, like.c[column].type) for column in frame.columns]
    staging = create_staging(connection, name, columns)
    copy_into(connection, frame, staging)
    return staging


def create_staging(connection: sa.Connection, name: str, columns: Sequence[sa.Column[Any]]) -> sa.Table:
    """一张空的临时表，在这个事务里用；用完又要用同样的一张，先 `release_staging`。

    每个运行都要同样的几张，所以一个数据库连接只建一次：建一张要写十几行系统表，一毫秒多。上次留下的行在这里清掉：
    ON COMMIT DELETE ROWS 不论用没用过，每次提交都清空全部临时表，一张四分之一毫秒。
    名字带着定义的散列，同名而列不同的不会碰在一起。
    """
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
    _driver(connection).execute(f"{ddl}; {clear} {quoted}".encode(), prepare=False)  # 一次往返，所以不能预备
    used[table.name] = False
    return table


def release_staging(connection: sa.Connection, staging: sa.Table) -> None:
    """用完了；这个事务里还能再要一张同样的空表。"""
    _used_stagings(connection)[staging.name] = True


def analyze_staging(connection: sa.Connection, staging: sa.Table) -> None:
    """给规划器这张临时表的统计：自动的 ANALYZE 看不见临时表。"""
    connection.exec_driver_sql(f"ANALYZE {connection.dialect.identifier_preparer.format_table(staging)}")


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
    with _driver(connection).cursor() as cursor, cursor.copy(statement.encode()) as copy:
        for part in frame.iter_slices(_WRITE_CHUNK_ROWS):
            copy.write(_format(part))


def _format(frame: pl.DataFrame) -> bytes | memoryview:
    if frame.height * frame.width <= few_rows.FEW_CELLS:
        return few_rows.encode(frame)
    buffer = io.BytesIO()
    frame.write_csv(buffer, include_header=False)
    return buffer.getbuffer()


def upsert_staged(connection: sa.Connection, staging: sa.Table, table: sa.Table, how: Upsert) -> WriteCounts:
    """把暂存表写进目标表：只写新的或变了的行，其余不碰；目标表没有的列不写。

    不用 ON CONFLICT：它给每一行加锁、多写一条 WAL（1M 行慢三成）。同样的键别的运行不会同时写，锁隔开了它们；
    别的系统若恰好插进同一个键，唯一约束报错，整个事务由 retry_conflicts 重来。
    条件与新值对加锁之后的最新行求值，所以读与写之间别人提交的改动不会被盖掉。
    """
    inserted, updated = connection.exec_driver_sql(_upsert_statement(staging, table, how, connection.dialect.identifier_preparer)).one()
    return WriteCounts(inserted=inserted, updated=updated)


@lru_cache(maxsize=64)
def _upsert_statement(staging: sa.Table, table: sa.Table, how: Upsert, preparer: sa.sql.compiler.IdentifierPreparer) -> str:
    """每个运行都要同样的几条：拼一次就留着。"""
    quote, target, stage = preparer.quote, preparer.format_table(table), preparer.format_table(staging)
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
    return f"""
        WITH updated AS (
            UPDATE {target} t SET {", ".join(assignments)}
            FROM {stage} s
            WHERE {same_key} AND ({existing_row}) IS DISTINCT FROM ({new_row})
            RETURNING 1
        ), inserted AS (
            INSERT INTO {target} ({", ".join(map(quote, columns))})
            SELECT {", ".join(f"s.{quote(name)}" for name in columns)}
            FROM {stage} s
            WHERE NOT EXISTS (SELECT FROM {target} t WHERE {same_key})
            ORDER BY {", ".join(f"s.{quote(name)}" for name in how.key)}
            RETURNING 1
        )
        SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM updated)"""  # noqa: S608  # 只拼接引用过的标识符


def upsert_frame(connection: sa.Connection, frame: pl.DataFrame, table: sa.Table, how: Upsert) -> WriteCounts:
    """暂存一帧并写进目标表。"""
    staging = stage_frame(connection, frame, name=f"staged_{table.name}", like=table)
    counts = upsert_staged(connection, staging, table, how)
    release_staging(connection, staging)
    return counts + WriteCounts(rows=frame.height)


def _driver(connection: sa.Connection) -> psycopg.Connection[Any]:
    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]  # 引擎固定用 psycopg
    return driver


def _copy_out(
    connection: sa.Connection, statement: sa.Select[Any], given: Parameters, stopped: threading.Event | None = None
) -> Iterator[io.BytesIO]:
    """COPY 的 csv 文本，一块约 16 MB；至少一块，可能是空的。`stopped` 置位后取消查询。"""
    check_interruption()
    text, parameters = _compile(connection, statement, given)
    buffer = io.BytesIO()
    is_first = True
    cursor = _driver(connection).cursor()
    with cursor, cursor.copy(f"COPY ({text}) TO STDOUT (FORMAT csv)".encode(), parameters) as copy:
        for row in copy:  # psycopg 每行给一个 memoryview：立刻写走，不能攒成列表
            buffer.write(row)
            if buffer.tell() >= _READ_CHUNK_BYTES:
                yield buffer
                is_first = False
                buffer = io.BytesIO()
                if stopped is not None and stopped.is_set():
                    return
    if buffer.tell() or is_first:
        yield buffer


def _booleans_as_text(statement: sa.Select[Any], columns: Sequence[sa.ColumnElement[Any]]) -> sa.Select[Any]:
    """COPY 把布尔写成 t/f，read_csv 只认 true/false。"""
    if not any(isinstance(column.type, sa.Boolean) for column in columns):
        return statement
    return statement.with_only_columns(
        *[sa.cast(c, sa.Text).label(c.name) if isinstance(c.type, sa.Boolean) else c for c in columns],
        maintain_column_froms=True,
    )


def _compile(connection: sa.Connection, statement: sa.Select[Any], given: Parameters) -> tuple[str, Mapping[str, Any] | None]:
    """COPY 不收服务器端参数，psycopg 在客户端绑定；只有带参数时它才把 %% 还原成 %。列表写成 = ANY(数组)，不写 IN。"""
    compiled = _compiled.get(statement)
    if compiled is None:  # 每个运行都要的语句是留着的同一个对象，只编译一次
        printable = _booleans_as_text(statement, list(statement.selected_columns))
        compiled = _compiled[statement] = printable.compile(dialect=connection.dialect)
    parameters = compiled.construct_params(dict(given))
    return (str(compiled), parameters) if parameters else (str(compiled).replace("%%", "%"), None)


def _parse(buffer: io.BytesIO, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    data = buffer.getvalue()
    if len(data) <= few_rows.FEW_BYTES:
        with suppress(ValueError):  # Python 装不下的值，让 read_csv 去说
            return few_rows.decode(data, schema)
    if data.startswith(codecs.BOM_UTF8):  # read_csv 会吃掉开头的一个 BOM，而它是第一个值的一部分
        data = codecs.BOM_UTF8 + data
    return pl.read_csv(data, has_header=False, schema=dict(schema))
