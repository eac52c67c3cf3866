"""驱动的错误在这一处变成本包的错误：消息说怎么办，类别说重试有没有用。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.errors import DatabaseUnavailableError, EtlError, PermanentError, TransientError


@contextmanager
def translated_errors() -> Iterator[None]:
    """块里的数据库错误变成 EtlError。"""
    try:
        yield
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise translate(driver_error(error)) from error


def driver_error(error: sa.exc.DBAPIError | psycopg.Error) -> BaseException:
    """最先的 psycopg 错误。SQLAlchemy 把它包着；连接断了之后连回滚也失败，后来的那个错误说不出原因。"""
    earlier = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error.__context__
    return driver_error(earlier) if isinstance(earlier, sa.exc.DBAPIError | psycopg.Error) else error


def translate(cause: BaseException) -> EtlError:
    """一个驱动错误对应的 EtlError。没有等到提交的，都已回滚。"""
    summary = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    match cause:
        case psycopg.errors.LockNotAvailable():
            return TransientError(f"another run holds the rows for longer than ETL_LOCK_TIMEOUT_SECONDS: {summary}")
        case psycopg.errors.QueryCanceled():
            return EtlError(f"a statement ran longer than ETL_STATEMENT_TIMEOUT_SECONDS or was cancelled: {summary}")
        case psycopg.errors.IdleInTransactionSessionTimeout():
            return TransientError(f"the process paused in a transaction for longer than ETL_IDLE_TRANSACTION_TIMEOUT_SECONDS: {summary}")
        case psycopg.errors.DeadlockDetected() | psycopg.errors.SerializationFailure():
            return TransientError(f"other runs were in the way every time, nothing was written: {summary}")
        case psycopg.errors.DiskFull():
            return TransientError(f"the disk of the PostgreSQL server is full, nothing was written; free space and try again: {summary}")
        case psycopg.errors.OutOfMemory() | psycopg.errors.InsufficientResources() | psycopg.errors.ConfigurationLimitExceeded():
            return TransientError(f"PostgreSQL is out of resources, free some and the run will succeed: {summary}")
        case psycopg.errors.UndefinedTable() | psycopg.errors.UndefinedColumn():
            return PermanentError(f"the tables differ from the contract, run `etl init-db` or correct them: {summary}")
        case psycopg.errors.InsufficientPrivilege():
            return PermanentError(f"the role of ETL_DATABASE_URL lacks a right, grant it: {summary}")
        case psycopg.errors.ProgramLimitExceeded():
            return PermanentError(
                f"PostgreSQL cannot hold a value that is so large, nothing was written; shorten the value, or drop the index: {summary}"
            )
        case psycopg.OperationalError() if cause.pgconn is not None:  # 只有没连上的错误带着它
            return DatabaseUnavailableError(
                f"cannot reach the PostgreSQL of ETL_DATABASE_URL, nothing was written; check that it is up: {summary}"
            )
        case (
            psycopg.OperationalError(sqlstate=None)
            | psycopg.InterfaceError()
            | psycopg.errors.AdminShutdown()
            | psycopg.errors.CrashShutdown()
            | psycopg.errors.CannotConnectNow()
        ):
            return DatabaseUnavailableError(
                "the connection to the PostgreSQL of ETL_DATABASE_URL failed, what was not committed is undone; "
                f"check that it is up and try again: {summary}"
            )
        case psycopg.errors.DataError() | psycopg.errors.IntegrityError():
            return PermanentError(f"PostgreSQL refused the data, nothing was written: {summary}")
        case _:
            return EtlError(f"PostgreSQL reported: {summary}")
