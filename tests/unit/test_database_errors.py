"""驱动的错误变成会说话的错误：类别说重试有没有用。"""

from __future__ import annotations

import socket

import psycopg
import psycopg.errors
import psycopg2
import psycopg2.errors
import pytest
import sqlalchemy as sa

from etl_assets.core.database_errors import DECISIONS, driver_error, fault_of, translate, translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    EtlError,
    PermanentError,
    StatementTimeoutError,
    TableContractError,
    TransientError,
)
from etl_assets.core.settings import EtlSettings

SECRET = "h0nse-Secret"


# 表的每一行：SQLSTATE → 类别与该说的话
LINES: dict[str, tuple[type[EtlError], str]] = {
    "08006": (DatabaseUnavailableError, "check that it is up"),
    "22003": (PermanentError, "refused the data"),
    "22023": (DatabaseRefusedError, "ETL_TIMEZONE"),
    "22P05": (PermanentError, "refused the data"),
    "23505": (PermanentError, "refused the data"),
    "25001": (TransientError, "not in the state"),
    "25006": (DatabaseRefusedError, "default_transaction_read_only"),
    "25P02": (TransientError, "not in the state"),
    "25P03": (TransientError, "ETL_IDLE_TRANSACTION_TIMEOUT_SECONDS"),
    "25P04": (StatementTimeoutError, "ETL_STATEMENT_TIMEOUT_SECONDS"),
    "26000": (DatabaseRefusedError, "pool by session"),
    "28000": (DatabaseRefusedError, "user or password"),
    "28P01": (DatabaseRefusedError, "user or password"),
    "3D000": (DatabaseRefusedError, "create it or correct the address"),
    "3F000": (DatabaseRefusedError, "`etl init-db`"),
    "40001": (TransientError, "other runs were in the way"),
    "40P01": (TransientError, "other runs were in the way"),
    "42501": (DatabaseRefusedError, "lacks a right, grant it"),
    "42601": (DatabaseRefusedError, "`etl init-db`"),
    "42703": (DatabaseRefusedError, "`etl init-db`"),
    "42804": (DatabaseRefusedError, "`etl init-db`"),
    "42883": (DatabaseRefusedError, "`etl init-db`"),
    "42P01": (DatabaseRefusedError, "`etl init-db`"),
    "42P05": (DatabaseRefusedError, "pool by session"),
    "53100": (TransientError, "disk of the PostgreSQL server is full"),
    "53200": (TransientError, "out of resources"),
    "53300": (TransientError, "out of resources"),
    "53400": (TransientError, "out of resources"),
    "54000": (PermanentError, "cannot hold a value that is so large"),
    "54001": (EtlError, "PostgreSQL reported"),
    "55000": (TransientError, "in use or not ready"),
    "55006": (TransientError, "in use or not ready"),
    "55P03": (TransientError, "ETL_LOCK_TIMEOUT_SECONDS"),
    "57014": (StatementTimeoutError, "ETL_STATEMENT_TIMEOUT_SECONDS"),
    "57P01": (DatabaseUnavailableError, "what was not committed is undone"),
    "57P02": (DatabaseUnavailableError, "what was not committed is undone"),
    "57P03": (DatabaseUnavailableError, "what was not committed is undone"),
    "57P04": (DatabaseRefusedError, "create it or correct the address"),
    "57P05": (DatabaseUnavailableError, "what was not committed is undone"),
    "58030": (DatabaseRefusedError, "its own files"),
    "58P01": (DatabaseRefusedError, "its own files"),
    "72000": (TransientError, "other runs were in the way"),
    "F0000": (DatabaseRefusedError, "its own files"),
    "HV000": (TransientError, "foreign table"),
    "P0001": (EtlError, "PostgreSQL reported"),
    "XX000": (TransientError, "internal error"),
    "XX001": (DatabaseRefusedError, "damaged"),
    "XX002": (DatabaseRefusedError, "REINDEX"),
}
MAY_BE_CONTENT = "02 03 09 0A 0B 0F 0L 0P 0Z 10 20 21 24 27 2B 2D 2F 34 38 39 3B 44 P0"
"""说不准的，计次数。"""


def of_psycopg(sqlstate: str, text: str) -> psycopg.Error:
    error = psycopg.errors._class_for_state(sqlstate)(text)
    error.sqlstate = sqlstate
    return error


def of_psycopg2(sqlstate: str, text: str) -> psycopg2.Error:
    try:
        error = psycopg2.errors.lookup(sqlstate)(text)
    except KeyError:
        error = psycopg2.DatabaseError(text)
    error.__setstate__({"pgcode": sqlstate})
    return error


@pytest.mark.parametrize(
    ("sqlstate", "kind", "advice"), [(code, *line) for code, line in LINES.items()], ids=list(LINES)
)
def test_sqlstate_says_what_to_do_and_whose_fault_it_is(sqlstate: str, kind: type[EtlError], advice: str) -> None:
    error = translate(of_psycopg(sqlstate, "first line\nDETAIL: second line"))
    assert type(error) is kind
    assert advice in str(error)
    assert str(error).endswith(": first line")


@pytest.mark.parametrize(("sqlstate", "kind"), [(code, kind) for code, (kind, _) in LINES.items()], ids=list(LINES))
def test_storage_of_dagster_is_judged_by_the_same_table(sqlstate: str, kind: type[EtlError]) -> None:
    """psycopg2 的错误，光着、由 SQLAlchemy 包着、由 Dagster 再包一层；它的行不是哪一天的内容。"""
    expected = EtlError if kind is PermanentError else kind
    cause = of_psycopg2(sqlstate, "first line")
    wrapped = sa.exc.DBAPIError.instance("SELECT 1", {}, cause, psycopg2.Error)
    assert isinstance(wrapped, sa.exc.DBAPIError)
    by_dagster = RuntimeError("too many retries")
    by_dagster.__cause__ = wrapped
    for error in (cause, wrapped, by_dagster):
        assert type(fault_of(error)) is expected
    assert "ETL_DATABASE_URL" not in str(fault_of(wrapped))


def test_every_line_of_the_table_is_tested_and_every_class_of_postgresql_is_decided() -> None:
    assert all(any(code.startswith(line) for code in LINES) for line in DECISIONS)
    named = (getattr(psycopg.errors, name) for name in dir(psycopg.errors))
    known = {
        kind.sqlstate[:2]
        for kind in named
        if isinstance(kind, type) and issubclass(kind, psycopg.Error) and kind.sqlstate
    }
    assert " ".join(sorted(known - {line[:2] for line in DECISIONS})) == MAY_BE_CONTENT


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (
            psycopg.OperationalError("server closed the connection unexpectedly"),
            DatabaseUnavailableError,
            "what was not committed is undone",
        ),
        (
            psycopg.InterfaceError("the connection is closed"),
            DatabaseUnavailableError,
            "what was not committed is undone",
        ),
        (psycopg2.InterfaceError("connection already closed"), DatabaseUnavailableError, "DAGSTER_POSTGRES_URL"),
        (
            psycopg.errors.ConnectionTimeout("connection timeout expired"),
            DatabaseUnavailableError,
            "check that it is up",
        ),
        (
            psycopg.OperationalError("failed to resolve host 'db': [Errno -2] unknown"),
            DatabaseUnavailableError,
            "name server",
        ),
        (
            psycopg2.OperationalError('could not translate host name "db" to address'),
            DatabaseUnavailableError,
            "name server",
        ),
        (
            psycopg2.OperationalError('FATAL:  password authentication failed for user "etl"'),
            DatabaseRefusedError,
            "user or password",
        ),
        (psycopg2.OperationalError('FATAL:  role "etl" does not exist'), DatabaseRefusedError, "user or password"),
        (
            psycopg.OperationalError('FATAL:  no pg_hba.conf entry for host "10.0.0.1"'),
            DatabaseRefusedError,
            "user or password",
        ),
        (psycopg.OperationalError('FATAL:  database "etl" does not exist'), DatabaseRefusedError, "create it"),
        (psycopg.OperationalError('FATAL:  permission denied for database "etl"'), DatabaseRefusedError, "grant it"),
        (psycopg.OperationalError("FATAL:  sorry, too many clients already"), TransientError, "out of resources"),
        (
            psycopg2.OperationalError("FATAL:  unsupported startup parameter: options"),
            DatabaseRefusedError,
            "ignore_startup_parameters = options) and pool by session, or put PostgreSQL itself into DAGSTER_POSTGRES_URL",
        ),
        (
            psycopg.OperationalError('致命错误:  用户 "etl" Password 认证失败'),
            DatabaseUnavailableError,
            "check that it is up",
        ),
        (
            psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes"),
            PermanentError,
            "refused the data",
        ),
        (psycopg.ProgrammingError("cannot adapt type"), EtlError, "PostgreSQL reported"),
        (
            of_psycopg("54000", "database is not accepting commands to avoid wraparound data loss"),
            DatabaseRefusedError,
            "VACUUM",
        ),
        (sa.exc.TimeoutError("QueuePool limit of size 5 overflow 5 reached"), TransientError, "ETL_POOL_SIZE"),
        (socket.gaierror(-2, "Name or service not known"), TransientError, "gaierror"),
        (OSError(24, "Too many open files"), TransientError, "Too many open files"),
        (ConnectionResetError("reset by peer"), TransientError, "ConnectionResetError"),
        (TableContractError([]), TableContractError, "correct the tables"),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_error_without_sqlstate_is_decided_too(error: Exception, kind: type[EtlError], advice: str) -> None:
    fault = fault_of(error)
    assert type(fault) is kind
    assert advice in str(fault)


def test_error_of_the_code_is_nobody_s_fault_that_we_know() -> None:
    assert fault_of(ZeroDivisionError("division by zero")) is None


def test_error_without_a_text_is_named_by_its_class() -> None:
    assert str(translate(psycopg.errors.DiskFull())).endswith(": DiskFull")


def test_cause_is_kept_whether_sqlalchemy_wrapped_it_or_not() -> None:
    cause = psycopg.errors.UndefinedTable("no such table")
    wrapped = sa.exc.ProgrammingError("SELECT 1", {}, cause)
    for raised in (cause, wrapped):
        with pytest.raises(DatabaseRefusedError, match="no such table") as caught, translated_errors():
            raise raised
        assert caught.value.__cause__ is raised
        assert driver_error(raised) is cause


def test_first_error_is_the_cause_when_the_rollback_fails_too() -> None:
    first = psycopg.errors.AdminShutdown("terminating connection")

    def fail_twice() -> None:
        try:
            raise first
        finally:
            raise psycopg.OperationalError("the connection is lost")

    with pytest.raises(psycopg.OperationalError) as later:
        fail_twice()
    wrapped = sa.exc.OperationalError("ROLLBACK", {}, later.value)
    assert driver_error(later.value) is first
    assert driver_error(wrapped) is first


def test_lost_connection_is_the_cause_when_it_comes_while_a_refused_value_is_handled() -> None:
    with pytest.raises(DatabaseUnavailableError), translated_errors():  # noqa: PT012  # 两个错误，一个在另一个里
        try:
            raise psycopg.errors.UniqueViolation("twice")
        except psycopg.errors.UniqueViolation:
            raise psycopg.errors.AdminShutdown("terminating connection") from None


def test_other_errors_pass_untranslated() -> None:
    with pytest.raises(ZeroDivisionError), translated_errors():
        _ = 1 / 0


def test_unreachable_server_is_transient_and_the_password_stays_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    engine = build_engine(EtlSettings(database_url=f"postgresql://etl:{SECRET}@127.0.0.1:{port}/etl"))
    with (
        pytest.raises(DatabaseUnavailableError, match="cannot reach the PostgreSQL") as caught,
        translated_errors(),
        engine.connect(),
    ):
        pass
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__
