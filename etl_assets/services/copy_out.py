"""COPY 读出一个查询，成为帧；大的一边读一边处理。"""

from __future__ import annotations

import codecs
import io
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import polars as pl
import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON

from etl_assets.core.database_sync import compile_once
from etl_assets.core.interruption import check_interruption
from etl_assets.services import few_rows

_READ_CHUNK_BYTES = 16 << 20
Parameters = Mapping[str, object]
"""语句里 bindparam 的值。"""
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
)


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


def read_frame(
    connection: sa.Connection, statement: sa.Select[Any], parameters: Parameters = MappingProxyType({})
) -> pl.DataFrame:
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
) -> Iterator[Iterator[pl.DataFrame]]:
    """同 read_batches，但由一个线程先读着下一批：服务器发送时，调用者处理上一批。

    离开 with 时没读完的查询被取消；出来以前连接归那个线程用。
    """
    schema = {column.name: polars_type(column.type) for column in statement.selected_columns}
    source = _copy_out(connection, statement, parameters)
    first = next(source)  # 头一批就在这里读；多半只有这一批，不必起线程
    if first.tell() < _READ_CHUNK_BYTES and next(source, None) is None:
        yield iter([_parse(first, schema)])
        return

    def batches(reader: ThreadPoolExecutor) -> Iterator[pl.DataFrame]:
        chunk: io.BytesIO | None = first
        while chunk is not None:
            following = reader.submit(next, source, None)
            yield _parse(chunk, schema)
            chunk = following.result()

    # 次序要紧：先等线程停下，再关生成器，它正在线程里执行着的时候关不了
    with closing(source), ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        yield batches(reader)


def driver_of(connection: sa.Connection) -> psycopg.Connection[Any]:
    driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]  # 引擎固定用 psycopg
    return driver


def _copy_out(
    connection: sa.Connection, statement: sa.Select[Any], given: Parameters
) -> Generator[io.BytesIO, None, None]:
    """COPY 的 csv 文本，一块约 16 MB；至少一块，可能是空的。没读完就关上（close）的，取消查询。"""
    check_interruption()
    text, parameters = _compile(connection, statement, given)
    buffer = io.BytesIO()
    is_first = True
    cursor = driver_of(connection).cursor()
    with cursor, cursor.copy(f"COPY ({text}) TO STDOUT (FORMAT csv)".encode(), parameters) as copy:
        for row in copy:  # psycopg 每行给一个 memoryview：立刻写走，不能攒成列表
            buffer.write(row)
            if buffer.tell() >= _READ_CHUNK_BYTES:
                yield buffer
                is_first = False
                buffer = io.BytesIO()
    if buffer.tell() or is_first:
        yield buffer


@lru_cache(maxsize=200)
def _booleans_as_text(statement: sa.Select[Any]) -> sa.Select[Any]:
    """COPY 把布尔写成 t/f，read_csv 只认 true/false。"""
    columns = list(statement.selected_columns)
    if not any(isinstance(column.type, sa.Boolean) for column in columns):
        return statement
    return statement.with_only_columns(
        *[sa.cast(c, sa.Text).label(c.name) if isinstance(c.type, sa.Boolean) else c for c in columns],
        maintain_column_froms=True,
    )


def _compile(
    connection: sa.Connection, statement: sa.Select[Any], given: Parameters
) -> tuple[str, Mapping[str, Any] | None]:
    """COPY 不收服务器端参数，psycopg 在客户端绑定；只有带参数时它才把 %% 还原成 %。列表写成 = ANY(数组)，不写 IN。"""
    compiled = compile_once(_booleans_as_text(statement), connection.dialect)
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
