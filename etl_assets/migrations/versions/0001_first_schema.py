"""第一版 schema：应用表（仅在空库里）与 schema etl。"""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0001"
down_revision = None

_FOLDER = Path(__file__).parent


def upgrade() -> None:
    connection = op.get_bind()
    if context.config.attributes["create_application_tables"]:
        connection.exec_driver_sql((_FOLDER / "0001_application_tables.sql").read_text(encoding="utf-8"))
    connection.exec_driver_sql((_FOLDER / "0001_etl.sql").read_text(encoding="utf-8"))
    connection.exec_driver_sql("INSERT INTO etl.installation DEFAULT VALUES")
