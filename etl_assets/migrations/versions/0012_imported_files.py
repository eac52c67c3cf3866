"""导入过的文件的内容与时段：同一个文件再来时认得出；更早的导出盖过更新的，也看得出。"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        """
        CREATE TABLE etl.imported_files (
            import_id uuid NOT NULL PRIMARY KEY,
            content_hash text NOT NULL,
            first_ordered_at timestamptz,
            last_ordered_at timestamptz
        );
        CREATE INDEX ix_imported_files_content_hash ON etl.imported_files (content_hash);
        CREATE INDEX ix_imported_files_last_ordered_at ON etl.imported_files (last_ordered_at);
        """
    )
