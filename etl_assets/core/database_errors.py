"""数据库的错误在这一处分类：消息说怎么办，类别说是谁的错、重试有没有用。

一张表，每个 SQLSTATE 只决定一次：先看全码，再看前两位的类。Dagster 自己的存储用 psycopg2，走同一张表。
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    EtlError,
    PermanentError,
    StatementTimeoutError,
    TransientError,
)
from etl_assets.core.log import RepeatedWarning, get_logger

DATABASE_ERRORS = (sa.exc.DBAPIError, sa.exc.TimeoutError, psycopg.Error)
"""没有人翻译过的：SQLAlchemy 的、它的连接池的、驱动的。"""

_refused = RepeatedWarning(get_logger(__name__), "the database refuses, waiting", level="error")


@dataclass(frozen=True)
class Decision:
    """一种错误：归哪一类，怎么说。sentence 里的 {url}、{init} 随哪个驱动而变。"""

    kind: type[EtlError]
    sentence: str


# 哪一边的数据库：地址在哪个设置里，表由哪个命令建
_OF_ETL = {"url": "ETL_DATABASE_URL", "init": "`etl init-db`"}
_OF_DAGSTER = {"url": "DAGSTER_POSTGRES_URL", "init": "`dagster instance migrate`"}

_LOST = Decision(
    DatabaseUnavailableError,
    "the connection to the PostgreSQL of {url} failed, what was not committed is undone; check that it is up and try again",
)
_UNREACHABLE = Decision(
    DatabaseUnavailableError, "cannot reach the PostgreSQL of {url}, nothing was written; check that it is up"
)
_CONFLICT = Decision(TransientError, "other runs were in the way every time, nothing was written")
_TOO_LONG = Decision(
    StatementTimeoutError, "a statement ran longer than ETL_STATEMENT_TIMEOUT_SECONDS or was cancelled"
)
_CONTENT = Decision(PermanentError, "PostgreSQL refused the data, nothing was written")
_EXHAUSTED = Decision(TransientError, "PostgreSQL is out of resources, free some and the run will succeed")
_TABLES = Decision(DatabaseRefusedError, "the tables differ from the contract, run {init} or correct them")
_RIGHTS = Decision(DatabaseRefusedError, "the role of {url} lacks a right, grant it")
_LOGIN = Decision(DatabaseRefusedError, "PostgreSQL refuses the user or password of {url}, correct either")
_TLS = Decision(
    DatabaseRefusedError,
    "the certificate of the PostgreSQL of {url} is refused, correct its sslmode, sslrootcert and host, or the server's certificate",
)
_OWN_CERTIFICATE = Decision(
    DatabaseRefusedError,
    "the client certificate or key of {url} cannot be used or is refused, correct its sslcert and sslkey",
)
_NO_PRIMARY = Decision(
    DatabaseRefusedError, "no server that {url} names is a primary, point it at one or wait for the promotion"
)
_NO_SERVICE = Decision(
    DatabaseRefusedError, "the service of {url} is not there, name one of pg_service.conf (PGSERVICEFILE says which)"
)
_NO_DATABASE = Decision(
    DatabaseRefusedError, "the database that {url} names is not there, create it or correct the address"
)
_POOLER = Decision(
    DatabaseRefusedError,
    "a connection pooler mixes sessions, let it pool by session or put PostgreSQL itself into {url}",
)
_POOLER_OPTIONS = Decision(
    DatabaseRefusedError,
    "a connection pooler refuses the settings that we connect with, let it ignore them (ignore_startup_parameters = options) and pool by "
    "session, or put PostgreSQL itself into {url}",
)
_FILES = Decision(
    DatabaseRefusedError,
    "the PostgreSQL server cannot use its own files, its log says why; mend them or restore a backup",
)
_BUSY_POOL = Decision(TransientError, "all connections of this process are busy, raise ETL_POOL_SIZE if it stays")
_UNKNOWN = Decision(EtlError, "PostgreSQL reported")

_READ_ONLY = (
    "PostgreSQL is read-only, nothing was written; end that (default_transaction_read_only, the guard of a full disk), "
    "or point {url} at the primary"
)
READ_ONLY = _READ_ONLY.format(**_OF_ETL)

DECISIONS: Mapping[str, Decision] = {
    "08": _LOST,
    "22": _CONTENT,
    "22023": Decision(
        DatabaseRefusedError, "PostgreSQL does not know a value of our settings (ETL_TIMEZONE?), correct it"
    ),
    "23": _CONTENT,
    "25": Decision(
        TransientError, "the transaction was not in the state that the statement needs, nothing was written"
    ),
    "25006": Decision(DatabaseRefusedError, _READ_ONLY),
    "25P03": Decision(
        TransientError, "the process paused in a transaction for longer than ETL_IDLE_TRANSACTION_TIMEOUT_SECONDS"
    ),
    "25P04": _TOO_LONG,  # transaction_timeout：这一天可能就是这么大，与 57014 一样计次数
    "26": _POOLER,
    "28": _LOGIN,
    "3D": _NO_DATABASE,
    "3F": _TABLES,
    "40": _CONFLICT,
    "42": _TABLES,  # 语句是我们的，参数都是绑定的：语法也好、类型也好，内容改变不了它
    "42501": _RIGHTS,
    "42P05": _POOLER,
    "53": _EXHAUSTED,
    "53100": Decision(
        TransientError, "the disk of the PostgreSQL server is full, nothing was written; free space and try again"
    ),
    "54": _UNKNOWN,
    "54000": Decision(
        PermanentError,
        "PostgreSQL cannot hold a value that is so large, nothing was written; shorten the value, or drop the index",
    ),
    "55": Decision(TransientError, "something in PostgreSQL is in use or not ready, nothing was written"),
    "55P03": Decision(TransientError, "another run or person holds the rows for longer than ETL_LOCK_TIMEOUT_SECONDS"),
    "57": _LOST,
    "57014": _TOO_LONG,
    "57P04": _NO_DATABASE,
    "58": _FILES,
    "72": _CONFLICT,
    "F0": _FILES,
    "HV": Decision(TransientError, "the server behind a foreign table did not answer, nothing was written"),
    "XX": Decision(
        DatabaseRefusedError, "PostgreSQL found its own data damaged, its log says where; REINDEX or restore a backup"
    ),
    "XX000": Decision(
        TransientError, "PostgreSQL met an internal error, its log says more; if it stays, mend the server"
    ),
}
"""SQLSTATE 或它的前两位 → 决定。不在这里的计次数：触发器的错（P0）、视图的约束（44）可能是内容。"""

_WRAPAROUND = Decision(DatabaseRefusedError, "PostgreSQL has run out of transaction numbers, VACUUM the database")
"""与写不下的值同是 54000，只有话不同。"""

_OF_LOGIN: tuple[tuple[re.Pattern[str], Decision], ...] = (
    (re.compile(r"session is read-only|server is in hot standby mode"), _NO_PRIMARY),
    # 说的是我们的证书与私钥：比服务器的先看，它们也带着 certificate
    (
        re.compile(
            r"alert (?:certificate|bad certificate|unknown ca|handshake failure)|requires a valid client certificate|"
            r"certificate authentication failed|private key file|could not (?:load|read) (?:private key|certificate) file"
        ),
        _OWN_CERTIFICATE,
    ),
    (
        re.compile(
            r"certificate verify failed|server certificate for|root certificate file|could not read root certificate|"
            r"server does not support SSL|sslrootcert|sslmode"
        ),
        _TLS,
    ),
    (re.compile(r"definition of service|service file|service name"), _NO_SERVICE),
    (
        re.compile(
            r"password authentication failed|no password supplied|no pg_hba\.conf entry|not permitted to log in"
        ),
        _LOGIN,
    ),
    (re.compile(r'FATAL: .*role ".*" does not exist'), _LOGIN),
    (re.compile(r'FATAL: .*database ".*" does not exist|not currently accepting connections'), _NO_DATABASE),
    (re.compile(r"FATAL: .*permission denied for database"), _RIGHTS),
    (re.compile(r"unsupported startup parameter"), _POOLER_OPTIONS),
    (re.compile(r"FATAL: .*(?:too many (?:clients|connections)|remaining connection slots)"), _EXHAUSTED),
    (
        re.compile(r"failed to resolve host|could not translate host name"),
        Decision(DatabaseUnavailableError, "the host in {url} cannot be found, check the address and the name server"),
    ),
)
"""连不上时 libpq 不给 SQLSTATE，只有话；认不出的话（服务器说别的语言）也是暂时的，只是建议笼统些。"""


@contextmanager
def translated_errors() -> Iterator[None]:
    """块里的数据库错误变成 EtlError。"""
    try:
        yield
    except DATABASE_ERRORS as error:
        raise translate(driver_error(error)) from error


def driver_error(error: BaseException) -> BaseException:
    """最先的驱动错误。SQLAlchemy 把它包着；连接断了之后连回滚也失败，后来的那个错误说不出原因。"""
    if isinstance(error, sa.exc.DBAPIError) and error.orig is not None:
        return driver_error(error.orig)
    earlier = error.__context__
    if earlier is None or not _is_of_database(earlier):
        return error
    first = driver_error(earlier)
    # 收拾内容的错误时断了线：原因是断线
    return error if _decide(first).kind is PermanentError else first


def translate(cause: BaseException) -> EtlError:
    """一个驱动错误对应的 EtlError。没有等到提交的，都已回滚。"""
    decision = _decide(cause)
    side = _OF_DAGSTER if hasattr(cause, "pgcode") else _OF_ETL
    if side is _OF_DAGSTER and decision.kind is PermanentError:
        decision = _UNKNOWN  # Dagster 存储里的行不是哪一天的内容
    said = "; ".join([first_line(cause), *getattr(cause, "__notes__", ())])
    return decision.kind(f"{decision.sentence.format(**side)}: {said}")


def first_line(error: BaseException | None) -> str:
    """错误的头一句；什么也没说的，是它的类名。"""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fault_of(error: BaseException) -> EtlError | None:
    """这个错误归哪一类：它自己、或它明说的原因，是我们的、数据库的、操作系统的；说不上来是 None。"""
    if isinstance(error, EtlError):
        return error
    if _is_of_database(error):
        return translate(driver_error(error))
    if isinstance(error, OSError):  # 断线、超时、名字解析、句柄用完：不会是内容
        return TransientError(f"{type(error).__name__}: {error}")
    return fault_of(error.__cause__) if error.__cause__ is not None else None


def say_refused(error: DatabaseRefusedError) -> None:
    """一个进程的各部分都撞上同一堵墙，各说各的表：同一个办法合起来一分钟一句。"""
    _refused.say(str(error).partition(": ")[0], error=str(error))


def _decide(cause: BaseException) -> Decision:
    if isinstance(cause, sa.exc.TimeoutError):
        return _BUSY_POOL
    sqlstate = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if sqlstate is None:
        return _decide_without_sqlstate(cause)
    if sqlstate == "54000" and "wraparound" in str(cause):
        return _WRAPAROUND
    return DECISIONS.get(sqlstate) or DECISIONS.get(sqlstate[:2]) or _UNKNOWN


def _decide_without_sqlstate(cause: BaseException) -> Decision:
    """驱动自己的错误：没连上的看话，其余按 DB-API 的类名，两个驱动一样。"""
    for pattern, decision in _OF_LOGIN:
        if pattern.search(str(cause)):
            return decision
    if getattr(cause, "pgconn", None) is not None:  # 只有没连上的错误带着它
        return _UNREACHABLE
    names = {kind.__name__ for kind in type(cause).__mro__}
    if names & {"OperationalError", "InterfaceError"}:
        return _LOST
    return _CONTENT if names & {"DataError", "IntegrityError"} else _UNKNOWN


def _is_of_database(error: BaseException) -> bool:
    """psycopg2 不导入：它的错误都带 pgcode。"""
    return isinstance(error, DATABASE_ERRORS) or hasattr(error, "pgcode")
