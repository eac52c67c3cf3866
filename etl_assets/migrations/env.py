"""Alembic 环境：连接由 upgrade.py 给出；版本表放在 schema etl。"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from etl_assets.migrations.upgrade import VERSION_TABLE

connection: sa.Connection = context.config.attributes["connection"]
connection.execute(sa.schema.CreateSchema("etl", if_not_exists=True))
connection.commit()
context.configure(connection=connection, version_table=VERSION_TABLE, version_table_schema="etl", transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
