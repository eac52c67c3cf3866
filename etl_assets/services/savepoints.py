"""整批一起做，不行就逐个来：做不了的一个拖不住其余的。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa

from etl_assets.core.database_errors import driver_error, translate
from etl_assets.core.errors import EtlError, TransientError

Item = TypeVar("Item")


def handle_apart(
    connection: sa.Connection,
    items: Sequence[Item],
    handle: Callable[[Sequence[Item]], int],
    *,
    complain: Callable[[Item, EtlError], None],
) -> int:
    """返回 handle 给出的数之和；做不了的回滚到它之前，交给 complain。暂时的故障照抛，整个事务再来。"""
    if not items:
        return 0
    try:
        with connection.begin_nested():
            return handle(items)
    except sa.exc.DBAPIError as error:
        cause = translate(driver_error(error))
        if isinstance(cause, TransientError):
            raise
        if len(items) == 1:
            complain(items[0], cause)
            return 0
    return sum(handle_apart(connection, [item], handle, complain=complain) for item in items)
