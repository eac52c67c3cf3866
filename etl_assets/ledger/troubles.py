"""进程旁边的活出了什么事，收导入时看出了什么毛病：写下来给 `etl status` 与 `etl doctor` 看；没有再出的自己消失。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.etl_tables import troubles
from etl_assets.core.log import redact
from etl_assets.core.text import storable

RECENT = timedelta(hours=1)
_KEPT = timedelta(days=1)
INTAKE = "intake"
"""导入里的毛病记在这个名下，不是哪个进程的；导入也许一天才来一次。"""
_KEPT_OF_IMPORTS = timedelta(days=7)
_MESSAGE_CHARACTERS = 500
_SHOWN = 5


def note_trouble(connection: sa.Connection, *, process: str, task: str, message: str) -> None:
    """又出了一次：同一个进程的同一件事是一行，记最近的一句话与次数。"""
    text = redact(" ".join(storable(message).split()))[:_MESSAGE_CHARACTERS]
    insert = pg.insert(troubles).values(process=process, task=task, message=text)
    again = {"message": insert.excluded.message, "times": troubles.c.times + 1, "last_at": sa.func.clock_timestamp()}
    kept = sa.case((troubles.c.process == INTAKE, _KEPT_OF_IMPORTS), else_=_KEPT)
    # 没有谁专门来清：写的人顺手删去过了期的
    connection.execute(sa.delete(troubles).where(troubles.c.last_at < sa.func.clock_timestamp() - kept))
    connection.execute(insert.on_conflict_do_update(index_elements=["process", "task"], set_=again))


def recent_troubles(connection: sa.Connection) -> Sequence[sa.RowMapping]:
    """最近一小时里出过的，新的在前。"""
    recent = sa.and_(troubles.c.last_at > sa.func.clock_timestamp() - RECENT, troubles.c.process != INTAKE)
    return connection.execute(sa.select(troubles).where(recent).order_by(troubles.c.last_at.desc())).mappings().all()


def troubles_of_imports(connection: sa.Connection, target: str) -> Sequence[str]:
    """最近一周的导入里的毛病，新的在前，只有头几个。"""
    recent = of_imports(target, within=_KEPT_OF_IMPORTS)
    return connection.scalars(
        sa.select(troubles.c.message).where(recent).order_by(troubles.c.last_at.desc()).limit(_SHOWN)
    ).all()


def of_imports(target: str, *, within: timedelta) -> sa.ColumnElement[bool]:
    """SQL：收导入进这个 target 时看出来的，不比 within 旧；task 以 target 打头。"""
    ours = sa.and_(troubles.c.process == INTAKE, sa.func.starts_with(troubles.c.task, f"{target}: "))
    return sa.and_(ours, troubles.c.last_at > sa.func.clock_timestamp() - within)
