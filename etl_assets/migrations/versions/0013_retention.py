"""过了保留期的由谁正在清、上次何时清完；台账的簿记忘到了哪里。"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        CREATE TABLE etl.retention (
            is_only boolean DEFAULT true NOT NULL PRIMARY KEY CHECK (is_only),
            claimed_until timestamptz,
            finished_at timestamptz,
            forgotten_until timestamptz
        );
        INSERT INTO etl.retention DEFAULT VALUES;
        """
    )
