"""`etl status` 说每个资产最近一次做完的时刻，不必读整本台账。"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        "CREATE INDEX ix_ledger_materialized_at ON etl.ledger (target, asset, materialized_at)"
    )
