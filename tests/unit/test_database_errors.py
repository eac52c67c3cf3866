"""驱动的错误变成会说话的错误：类别说重试有没有用。"""

from __future__ import annotations

import socket

import psycopg
import psycopg.errors
import pytest
import sqlalchemy as sa

from etl_assets.core.database_errors import driver_error, translate, translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import DatabaseUnavailableError, EtlError, PermanentError, TransientError
from etl_assets.core.settings import EtlSettings

SECRET = "h0nse-Secret"


@pytest.mark.parametrize(
    ("cause", "kind", "advice"),
    [
        (psycopg.errors.LockNotAvailable, TransientError, "ETL_LOCK_TIMEOUT_SECONDS"),
        (psycopg.errors.QueryCanceled, EtlError, "ETL_STATEMENT_TIMEOUT_SECONDS"),
        (psycopg.errors.DiskFull, TransientError, "disk of the PostgreSQL server is full"),
        (psycopg.errors.OutOfMemory, TransientError, "out of resources"),
        (psycopg.errors.ConfigurationLimitExceeded, TransientError, "out of resources"),
        (psycopg.errors.DeadlockDetected, TransientError, "other runs were in the way"),
        (psycopg.errors.SerializationFailure, TransientError, "other runs were in the way"),
        (psycopg.errors.IdleInTransactionSessionTimeout, TransientError, "ETL_IDLE_TRANSACTION_TIMEOUT_SECONDS"),
        (psycopg.errors.AdminShutdown, DatabaseUnavailableError, "what was not committed is undone"),
        (psycopg.errors.CrashShutdown, DatabaseUnavailableError, "what was not committed is undone"),
        (psycopg.OperationalError, DatabaseUnavailableError, "what was not committed is undone"),
        (psycopg.InterfaceError, DatabaseUnavailableError, "what was not committed is undone"),
        (psycopg.errors.IoError, EtlError, "PostgreSQL reported"),
        (psycopg.errors.ProgramLimitExceeded, PermanentError, "cannot hold a value that is so large"),
        (psycopg.errors.UndefinedTable, PermanentError, "etl init-db"),
        (psycopg.errors.UndefinedColumn, PermanentError, "etl init-db"),
        (psycopg.errors.InsufficientPrivilege, PermanentError, "grant it"),
        (psycopg.errors.UniqueViolation, PermanentError, "refused the data"),
        (psycopg.errors.NumericValueOutOfRange, PermanentError, "refused the data"),
    ],
)
def test_driver_error_says_what_to_do_and_whether_a_retry_helps(cause: type[psycopg.Error], kind: type[EtlError], advice: str) -> None:
    error = translate(cause("first line\nDETAIL: second line"))
    assert type(error) is kind
    assert advice in str(error)
    assert str(error).endswith("first line")


def test_error_without_a_text_is_named_by_its_class() -> None:
    assert str(translate(psycopg.errors.DiskFull())).endswith(": DiskFull")


def test_cause_is_kept_whether_sqlalchemy_wrapped_it_or_not() -> None:
    cause = psycopg.errors.UndefinedTable("no such table")
    wrapped = sa.exc.ProgrammingError("SELECT 1", {}, cause)
    for raised in (cause, wrapped):
        with pytest.raises(PermanentError, match="no such table") as caught, translated_errors():
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


def test_other_errors_pass_untranslated() -> None:
    with pytest.raises(ZeroDivisionError), translated_errors():
        _ = 1 / 0


def test_unreachable_server_is_transient_and_the_password_stays_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    engine = build_engine(EtlSettings(database_url=f"postgresql://etl:{SECRET}@127.0.0.1:{port}/etl"))
    with pytest.raises(DatabaseUnavailableError, match="cannot reach the PostgreSQL") as caught, translated_errors(), engine.connect():
        pass
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__
