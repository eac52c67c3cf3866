"""不在图里了的资产也记着：它回来时，其间来的日子到期，其间失去订单的客户有标记。"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        CREATE TABLE etl.absent_assets (
            target text NOT NULL,
            asset text NOT NULL,
            by_customer boolean NOT NULL,
            PRIMARY KEY (target, asset)
        );
        """
    )
