"""网页来的运行也持有租约，未必有日子；取消的请求写在租约上；台账记得上次失败的运行，重来的才好接着它；事件的序号写进运行的标签。"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        ALTER TABLE etl.leases ALTER COLUMN first_day DROP NOT NULL, ALTER COLUMN last_day DROP NOT NULL;
        ALTER TABLE etl.leases ADD COLUMN cancel_requested_at TIMESTAMP WITH TIME ZONE;
        ALTER TABLE etl.ledger ADD COLUMN failed_run_id TEXT;
        ALTER TABLE etl.import_events ADD COLUMN stream_sequence BIGINT;
        """
    )
