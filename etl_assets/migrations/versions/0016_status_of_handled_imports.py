"""处理一个导入的事件时它是什么状态：后来变了而没有事件说，就是事件丢了。旧版本记下的没有。"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.get_bind().exec_driver_sql("ALTER TABLE etl.import_events ADD COLUMN import_status text")
