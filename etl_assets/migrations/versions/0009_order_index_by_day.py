"""一天里别的系统删去的订单，不必读整个订单索引去找。"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.get_bind().exec_driver_sql("CREATE INDEX ix_order_index_order_date ON etl.order_index (order_date)")
