"""视图 etl.accounting：每次导入的原始行各去了哪里。COLD 扫到哪一天记在 etl.cold_sweeps；没有查询再用的索引删去。"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    statements = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    op.get_bind().exec_driver_sql(
        """
        DROP INDEX etl.ix_order_index_day;
        COMMENT ON TABLE etl.locks IS
            'rows that stand for days, customers (striped), imports (striped) and the claim; locked in sorted order';
        CREATE TABLE etl.cold_sweeps (target TEXT NOT NULL PRIMARY KEY, last_warm_day DATE, rollout TEXT NOT NULL);
        COMMENT ON TABLE etl.cold_sweeps IS
            'leads without closed_at, of the customers in this share, are COLD if their last order is before last_warm_day, else OPEN';
        """
    )
    op.get_bind().exec_driver_sql(statements.replace("%", "%%"))  # 驱动把 % 当作占位符
