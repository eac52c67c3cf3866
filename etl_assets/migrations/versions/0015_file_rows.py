"""存下的行各是文件的第几行。"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(
        "ALTER TABLE etl.imported_files ADD COLUMN first_places integer[], ADD COLUMN first_rows integer[]"
    )
