"""Alembic 环境：连接由 upgrade.py 给出；版本表放在 schema etl。"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from etl_assets.migrations.upgrade import VERSION_TABLE

connection: sa.Connection = context.config.attributes["connection"]
# Alembic 一开始就读它的版本表，那张表在 schema etl 里，所以不能等第一个迁移来建
# IF NOT EXISTS 先问权限：表的主人之外的角色也该看得出什么都不必做
if not sa.inspect(connection).has_schema("etl"):
    connection.execute(sa.schema.CreateSchema("etl"))
connection.commit()
context.configure(
    connection=connection, version_table=VERSION_TABLE, version_table_schema="etl", transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
