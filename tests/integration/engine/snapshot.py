"""库里的全部内容：比较前后，看一次失败有没有留下什么。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.tables import APPLICATION_SCHEMA


def database_contents(engine: sa.Engine) -> dict[str, list[str]]:
    """应用的与 ETL 自己的每张表：各行写成文本，排好序；只看得到提交了的。"""
    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        tables = [
            f"{schema}.{name}"
            for schema in (APPLICATION_SCHEMA, "etl")
            for name in sorted(inspector.get_table_names(schema))
        ]
        return {name: list(connection.scalars(sa.text(f"SELECT t::text FROM {name} t ORDER BY 1"))) for name in tables}  # noqa: S608  # 表名来自目录
