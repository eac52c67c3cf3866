"""Polars 与 PostgreSQL 之间的整批读写：COPY 读出、COPY 暂存、一条集合语句写入。这里是它们的门面。

所有函数都收一个 SQLAlchemy Connection，在调用者的事务里工作；SQL 语句数与行数无关。
"""

from etl_assets.services.copy_out import Parameters, polars_type, read_batches, read_frame, reading_ahead
from etl_assets.services.staging import (
    analysis,
    analyze_staging,
    copy_into,
    create_staging,
    release_staging,
    sized,
    stage_columns,
    stage_frame,
    take_staging,
)
from etl_assets.services.upsert import Upsert, WriteCounts, upsert_frame, upsert_staged, upsert_text

__all__ = [
    "Parameters",
    "Upsert",
    "WriteCounts",
    "analysis",
    "analyze_staging",
    "copy_into",
    "create_staging",
    "polars_type",
    "read_batches",
    "read_frame",
    "reading_ahead",
    "release_staging",
    "sized",
    "stage_columns",
    "stage_frame",
    "take_staging",
    "upsert_frame",
    "upsert_staged",
    "upsert_text",
]
