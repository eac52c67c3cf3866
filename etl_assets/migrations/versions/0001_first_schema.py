"""第一版 schema：应用表（仅在空库里）与 schema etl。"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from etl_assets.core import tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    connection = op.get_bind()
    if context.config.attributes["create_application_tables"]:
        tables.application.create_all(connection)
    tables.etl.create_all(connection)
    connection.execute(sa.insert(tables.installation))
