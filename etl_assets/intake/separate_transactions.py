"""整批一起做，不行就一个一个事务地来：做不了的一个拖不住其余的，也不扣着它们的锁。"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa

from etl_assets.core.database_errors import translated_errors
from etl_assets.core.errors import DatabaseUnavailableError, EtlError

Item = TypeVar("Item")

PROBES = 3


def handle_apart(
    engine: sa.Engine,
    items: Sequence[Item],
    handle: Callable[[sa.Connection, Sequence[Item]], Sequence[Item]],
    *,
    complain: Callable[[Item, EtlError], None],
) -> tuple[list[Item], bool]:
    """handle 说做成的那些，与是不是每个都试过了；做不了的交给 complain，不论是谁的错。

    有几个做不了，其余的这一回不试：锁等不到时，一个就是 ETL_LOCK_TIMEOUT_SECONDS。数据库不在照抛。
    """
    if not items:
        return [], True
    done: list[Item] = []

    def attempt(some: Sequence[Item]) -> EtlError | None:
        try:
            with translated_errors(), engine.begin() as connection:
                finished = handle(connection, some)
        except DatabaseUnavailableError:
            raise
        except EtlError as error:
            return error
        except Exception as error:  # noqa: BLE001  # 一个上面的什么错，都拖不住别的
            return EtlError(f"{type(error).__name__}: {error}")
        done.extend(finished)
        return None

    error = attempt(items)
    if error is None:
        return done, True
    if len(items) == 1:
        complain(items[0], error)
        return [], True
    failed = 0
    for item in random.sample(items, len(items)):  # 每次都从同样几个试起，会一直轮不到别的
        if failed == PROBES:
            return done, False
        if error := attempt([item]):
            complain(item, error)
            failed += 1
    return done, True
