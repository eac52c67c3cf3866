"""进程旁边的活出了什么事：写下来给 `etl status` 与 `etl doctor` 看；一天没有再出的自己消失。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.log import redact
from etl_assets.core.tables import troubles

RECENT = timedelta(hours=1)
_KEPT = timedelta(days=1)
_MESSAGE_CHARACTERS = 500


def note_trouble(connection: sa.Connection, *, process: str, task: str, message: str) -> None:
    """又出了一次：同一个进程的同一件事是一行，记最近的一句话与次数。"""
    text = redact(" ".join(message.replace("\0", "").split()))[:_MESSAGE_CHARACTERS]
    insert = pg.insert(troubles).values(process=process, task=task, message=text)
    again = {"message": insert.excluded.message, "times": troubles.c.times + 1, "last_at": sa.func.clock_timestamp()}
    connection.execute(sa.delete(troubles).where(troubles.c.last_at < sa.func.clock_timestamp() - _KEPT))
    connection.execute(insert.on_conflict_do_update(index_elements=["process", "task"], set_=again))


def recent_troubles(connection: sa.Connection) -> Sequence[sa.RowMapping]:
    """最近一小时里出过的，新的在前。"""
    recent = troubles.c.last_at > sa.func.clock_timestamp() - RECENT
    return connection.execute(sa.select(troubles).where(recent).order_by(troubles.c.last_at.desc())).mappings().all()
