"""迁移得到的 schema 与 core/tables.py 与各资产的文件夹里的定义一致。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core import etl_tables, tables
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.databases import cloned_database

CATALOG = """
    SELECT table_schema, table_name, 'column ' || column_name,
           concat_ws(' ', data_type, numeric_precision, numeric_scale, is_nullable, is_identity, column_default)
    FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
    WHERE table_schema IN ('public', 'etl') AND table_type = 'BASE TABLE' AND table_name <> 'schema_version'
    UNION ALL
    SELECT schemaname, tablename, 'index ' || indexname, indexdef
    FROM pg_indexes WHERE schemaname IN ('public', 'etl') AND tablename <> 'schema_version'
    UNION ALL
    SELECT n.nspname, c.relname, 'constraint ' || k.conname, pg_get_constraintdef(k.oid)
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname IN ('public', 'etl') AND c.relname <> 'schema_version'
    ORDER BY 1, 2, 3
"""


def read_catalog(engine: sa.Engine) -> list[tuple[str, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(CATALOG)]


def test_migrated_schema_equals_the_table_definitions(engine: sa.Engine, postgres_url: str) -> None:
    with cloned_database(postgres_url, "template0") as url:
        defined = build_engine(EtlSettings(database_url=url))
        with defined.begin() as connection:
            connection.execute(sa.schema.CreateSchema("etl"))
            tables.application.create_all(connection)
            tables.target_tables(tables.APPLICATION_SCHEMA).metadata.create_all(connection)
            etl_tables.etl.create_all(connection)
        wanted = read_catalog(defined)
        defined.dispose()
    assert wanted
    assert read_catalog(engine) == wanted
