"""断开别人与这个数据库的连接：新的设置、口令与只读只对新的会话有效。"""

from __future__ import annotations

import sqlalchemy as sa

_END = sa.text(
    # autovacuum 的工作进程也在 pg_stat_activity 里，断开它要另一种权限
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


def end_other_sessions(connection: sa.Connection) -> None:
    """断开这个数据库的其他会话；返回时服务器未必已经收拾完它们。

    :raises sqlalchemy.exc.ProgrammingError: 有的会话属于我们不是其成员的角色。
    """
    connection.execute(_END)
