"""人写的列：owner、notes 与关闭；没有编号的商机整行都是人写的。ETL 从不写它们；认出它们的 SQL 与索引共用，在 core/tables.py。

这里是怎样不挡人的路。
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.database_sync import execute_together
from etl_assets.core.settings import EtlSettings

Result = TypeVar("Result")

_PAUSE_SECONDS = 0.05

_CLOSED_BY_PERSON = "({row}.closed_by IS NOT DISTINCT FROM 'user' AND {row}.closed_at IS NOT NULL)"

PROTECTED_COLUMNS = dict.fromkeys(("current_stage", "closed_at", "closed_by"), _CLOSED_BY_PERSON)
"""upsert 的保护条件：人关闭的商机，这几列归人。"""


def come_back(settings: EtlSettings, transact: Callable[[], Result]) -> Result:
    """写商机的一个事务。有人正改着要写的某一个，就全放开，过一会儿再来：等他的时候手里什么锁也没有。

    人的事务按什么次序改，我们不知道：锁着几个去等他手里的，就是死锁，而输的可能是他。所以语句锁商机都用 NOWAIT，从不等。

    :raises sa.exc.OperationalError: 等了 ETL_LOCK_TIMEOUT_SECONDS，他还没有提交。
    """
    deadline = time.monotonic() + settings.lock_timeout_seconds
    while True:
        try:
            return transact()
        except sa.exc.OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable) or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def give_way(
    connection: sa.Connection,
    settings: EtlSettings,
    *statements: sa.ClauseElement | str,
    parameters: Mapping[str, object],
) -> list[Sequence[tuple[Any, ...]]]:
    """同 come_back，给事务里的几条语句，放开的只是它们锁住的；连同保存点一次往返，返回各自的行。"""

    def write() -> list[Sequence[tuple[Any, ...]]]:
        try:
            return execute_together(
                connection, "SAVEPOINT gives_way", *statements, "RELEASE gives_way", parameters=parameters
            )[1:-1]
        except sa.exc.OperationalError as error:
            if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                # 只退这一步：已锁住的商机放开给人用，事务里别的锁（客户、COLD）与写好的都还在
                connection.exec_driver_sql("ROLLBACK TO SAVEPOINT gives_way")
            raise

    return come_back(settings, write)
