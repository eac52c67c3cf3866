"""ETL 数据的唯一引擎。导入本模块不连接；fork 或 spawn 之后每个进程各有一个连接池。"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.conninfo import conninfo_to_dict

from etl_assets.core import metrics
from etl_assets.core.business_day import assert_same_zone
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import SettingsError
from etl_assets.core.interruption import make_interruptible
from etl_assets.core.poolers import NAME, live_with_poolers
from etl_assets.core.settings import EtlSettings, get_settings
from etl_assets.core.silent_connections import SilenceWatch, libpq_patience

if TYPE_CHECKING:
    engine: sa.Engine

P = ParamSpec("P")
Result = TypeVar("Result")

_IDLE_SECONDS = 1.0
_READ_ONLY = "25006"
_GRACE_SECONDS = 30.0
"""服务器自己的 statement_timeout 之后再等这么久。"""
_USED_AT = "used_at"
_STAGED_BYTES = "staged_bytes"
MAX_IDLE_STAGED_BYTES = 1 << 20
_engines: dict[int, sa.Engine] = {}

RELIED_ON = {
    "client_encoding": "UTF8",  # COPY 的字节不经驱动换码
    "datestyle": "ISO",  # Polars 与驱动只读得懂它
    "timezone": "UTC",
    # 先锁后读：更高的级别里快照早在等锁之前，两个工人会领走同样的日子
    "default_transaction_isolation": "read committed",
}


def normalize_url(url: str, *, setting: str = "ETL_DATABASE_URL") -> sa.URL:
    """接受 postgres://、postgresql://、postgresql+psycopg:// 的写法，与 libpq 自己的，统一成 psycopg 3 驱动。"""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or "%" in (parsed.host or "") or "," in (parsed.host or ""):
        parsed = _parse_as_libpq(url)
    if parsed is None:
        # 不带原错误：口令里有 @ 或 : 时，它会引用口令的一段
        raise SettingsError(f"{setting} is not a database URL; use postgresql://user:password@host:5432/name") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingsError(f"{setting} must name a PostgreSQL database, not {parsed.get_backend_name()!r}")
    return parsed.set(drivername="postgresql+psycopg")


def _parse_as_libpq(url: str) -> sa.URL | None:
    """SQLAlchemy 读不懂的：几个主机各有端口、套接字的路径、`host=… dbname=…`。libpq 也读不懂的是 None。"""
    try:
        given = dict(conninfo_to_dict(re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", url)))
    except psycopg.ProgrammingError:
        return None
    hosts, ports = (str(given.pop(name, "")) for name in ("host", "port"))
    # 口令里的 @ 与 : 没有写成 %40 与 %3A，就会读成主机与端口；IPv6 的主机里只有十六进制数字与冒号
    if not re.fullmatch(r"[\d,]*", ports) or not re.fullmatch(
        r"([^@:,]*|[\da-fA-F:.]+)(,([^@:,]*|[\da-fA-F:.]+))*", hosts
    ):
        return None
    user, password, name = (given.pop(key, None) for key in ("user", "password", "dbname"))
    # SQLAlchemy 要每个主机有一个端口；空着的由 libpq 补上
    where = {"host": hosts, "port": ports if "," in ports or not hosts else ",".join([ports] * len(hosts.split(",")))}
    return sa.URL.create(
        "postgresql",
        username=None if user is None else str(user),
        password=None if password is None else str(password),
        database=None if name is None else str(name),
        query={key: str(value) for key, value in {**where, **given}.items() if str(value).strip(",")},
    )


def build_engine(settings: EtlSettings, *, longest_wait_seconds: float | None = None) -> sa.Engine:
    """按设置建引擎（不连接）。超时由设置给出；代码靠着的会话设置都写明，角色或数据库上 ALTER … SET 的别的值不算数。

    头一次连上时问服务器 ETL_TIMEZONE 是什么：监听器、工人、运行与命令，谁也不会按另一个时区写下一天。

    :param longest_wait_seconds: 一条语句至多等这么久，哪怕服务器还在做：只用于做两次也无妨的。None 就看服务器怎么说。
    """
    if not settings.database_url:
        raise SettingsError(
            "ETL_DATABASE_URL is not set: start the stack with `etl up` and wait until it says ready, or set it to your PostgreSQL"
        )
    on_connect = RELIED_ON | {
        "extra_float_digits": "1",  # COPY 读出的浮点数一位不少
        "array_nulls": "on",  # 驱动写的数组里，NULL 就是 NULL
        "quote_all_identifiers": "off",  # 表的约定按 format_type 写出的类型名核对
        "standard_conforming_strings": "on",  # DDL 里引用的文字，反斜杠就是反斜杠
        "random_page_cost": "1.1",  # 缺省的 4 当每次查找都要转一次磁盘：几百个客户就宁可把整张索引表读一遍
        "work_mem": "64MB",  # 一百万行的排序与散列留在内存里：4MB 时客户 ETL 慢五分之一
        "plan_cache_mode": "force_custom_plan",  # 临时表一次空、一次百万行：照空表定的计划不能留着用
        "statement_timeout": f"{settings.statement_timeout_seconds}s",
        "lock_timeout": f"{settings.lock_timeout_seconds}s",
        "idle_in_transaction_session_timeout": f"{settings.idle_transaction_timeout_seconds}s",
    }
    url = normalize_url(settings.database_url)
    engine = sa.create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=settings.pool_size,
        connect_args={
            "options": session_options({**on_connect, "application_name": NAME}),
            **libpq_patience(url),
            "connect_timeout": settings.connect_timeout_seconds,
        },
    )
    limit_seconds = longest_wait_seconds or settings.statement_timeout_seconds + _GRACE_SECONDS
    SilenceWatch(engine, limit_seconds=limit_seconds, is_hasty=longest_wait_seconds is not None)
    live_with_poolers(engine, on_connect)
    _refuse_another_zone(engine, settings)
    ping_idle_connections(engine)
    replace_read_only_sessions(engine)
    make_interruptible(engine)
    _discard_temp_tables(engine)  # 在它之后：归还的连接不再属于哪个运行，取消不会落在这里
    return engine


def session_options(values: Mapping[str, str]) -> str:
    """libpq 的 options：连上时就这样设，盖过角色与数据库上的。"""
    return " ".join(f"-c{name}={value}".replace(" ", "\\ ") for name, value in values.items())


def execute_compiled(
    connection: sa.Connection, statement: sa.Insert, parameters: Mapping[str, object]
) -> sa.CursorResult[Any]:
    """执行一条留着的 INSERT … ON CONFLICT：SQLAlchemy 不缓存它，每次都重新编译，比执行还久；这里只编译一次。

    :param statement: 留着的同一个对象，值都是带类型的 bindparam。
    """
    compiled = compile_once(statement, connection.dialect)
    return connection.exec_driver_sql(str(compiled), compiled.construct_params(dict(parameters)))


@lru_cache(maxsize=512)
def compile_once(statement: sa.ClauseElement, dialect: sa.Dialect) -> sa.Compiled:
    """每个运行都要的语句是留着的同一个对象，只编译一次。"""
    return statement.compile(dialect=dialect)


def autocommitting(engine: sa.Engine) -> AbstractContextManager[sa.Connection]:
    """给只发一条语句的：它自己就是一个事务，BEGIN 与 COMMIT 各是一次往返。"""
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


def transact(
    engine: sa.Engine, do: Callable[Concatenate[sa.Connection, P], Result], *args: P.args, **kwargs: P.kwargs
) -> Result:
    """在一个事务里做，数据库的错误变成 EtlError。"""
    with translated_errors(), engine.begin() as connection:
        return do(connection, *args, **kwargs)


def execute_together(
    connection: sa.Connection, *statements: sa.ClauseElement | str, parameters: Mapping[str, object]
) -> list[Sequence[tuple[Any, ...]]]:
    """几条语句一次往返，各给出自己的行；后一条看得见前一条等锁期间别人提交的。不在事务里时，它们合起来是一个。

    协议里一条消息装几条语句时带不了参数，所以参数由驱动在这一边绑定，与 COPY 一样。

    :param statements: 留着的同样几个对象，只编译一次；文字是没有参数的，照发。
    """
    driver: Any = connection.connection.driver_connection

    def bind(statement: sa.ClauseElement | str) -> str:
        if isinstance(statement, str):
            return statement
        compiled = compile_once(statement, connection.dialect)
        return cursor.mogrify(str(compiled), compiled.construct_params(dict(parameters)))

    with psycopg.ClientCursor(driver) as cursor:
        message = "; ".join(map(bind, statements))
        # 像 SQLAlchemy 自己执行时那样：先问听着的（取消、测试），错误由它认出断开与只读的会话
        for listen in connection.dispatch.before_cursor_execute:
            listen(connection, cursor, message, {}, None, False)
        try:
            cursor.execute(message.encode())
        except psycopg.Error as error:
            connection._handle_dbapi_exception(error, message, None, None, None)
        found = [_rows(cursor)]
        while cursor.nextset():
            found.append(_rows(cursor))
    return found


def _rows(cursor: psycopg.Cursor[Any]) -> Sequence[tuple[Any, ...]]:
    return cursor.fetchall() if cursor.description is not None else ()


def note_staged(connection: sa.Connection, size_bytes: int) -> None:
    """这个连接的临时表又装了这么多：攒多了，还给连接池时扔掉它们，不让闲着的连接占着磁盘。"""
    connection.info[_STAGED_BYTES] = connection.info.get(_STAGED_BYTES, 0) + size_bytes


def _refuse_another_zone(engine: sa.Engine, settings: EtlSettings) -> None:
    @sa.event.listens_for(engine, "first_connect")
    def _look(connection: Any, _record: Any) -> None:
        try:
            # 驱动为那一问开了事务，看完就结束它
            assert_same_zone(connection, settings)
            connection.rollback()
        except Exception:
            connection.close()
            raise


def _discard_temp_tables(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "checkin")
    def _checkin(connection: Any, record: Any) -> None:
        if connection is None or record.info.get(_STAGED_BYTES, 0) <= MAX_IDLE_STAGED_BYTES:
            return
        record.info[_STAGED_BYTES] = 0
        try:
            connection.execute("DISCARD TEMP")
            connection.commit()
        except engine.dialect.loaded_dbapi.Error as error:
            record.invalidate(error)


def ping_idle_connections(engine: sa.Engine) -> None:
    """借出闲置过的连接之前先试一试，断了就换新的；刚用过的不试：热的运行一秒要借几十次。"""

    @sa.event.listens_for(engine, "checkin")
    def _checkin(_connection: Any, record: Any) -> None:
        record.info[_USED_AT] = time.monotonic()

    @sa.event.listens_for(engine, "checkout")
    def _checkout(connection: Any, record: Any, _proxy: Any) -> None:
        if time.monotonic() - record.info.get(_USED_AT, time.monotonic()) < _IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise sa.exc.InvalidatePoolError from error  # 一条断了，同时的别的多半也断了


def replace_read_only_sessions(engine: sa.Engine) -> None:
    """只读的窗口（ALTER DATABASE … SET default_transaction_read_only）里开的会话，窗口关上以后还是只读：不还给连接池。"""

    @sa.event.listens_for(engine, "handle_error")
    def _discard(context: sa.engine.ExceptionContext) -> None:
        error = context.original_exception
        if _READ_ONLY not in (
            getattr(error, "sqlstate", None),
            getattr(error, "pgcode", None),
        ):  # psycopg 3 与 psycopg2
            return
        # 已经从连接池取走的本来就不还；作废它，反而没有人去关
        if context.connection is not None and not context.connection.connection.is_detached:
            context.is_disconnect = True


def get_engine() -> sa.Engine:
    """本进程共用的引擎；第一次调用时建立。子进程不会继承父进程的连接。"""
    pid = os.getpid()
    if pid not in _engines:
        for inherited in _engines.values():
            # 不关：套接字与父进程共用，从这边关会断掉它正用着的会话
            inherited.dispose(close=False)
        _engines.clear()
        settings = get_settings()
        _engines[pid] = build_engine(settings)
        metrics.watch_pool(_engines[pid], limit=2 * settings.pool_size)
    return _engines[pid]


def __getattr__(name: str) -> Any:
    """`from etl_assets.core.database_sync import engine` 也得到同一个引擎。"""
    if name == "engine":
        return get_engine()
    raise AttributeError(name)
