"""Dagster 资源：资产经由它拿到唯一的引擎与设置。"""

from __future__ import annotations

from dataclasses import dataclass

import dagster as dg
import sqlalchemy as sa

from etl_assets.core.database_sync import get_engine
from etl_assets.core.settings import EtlSettings, get_settings


@dataclass(frozen=True)
class EtlDatabase:
    """缺省是本进程共用的引擎与设置，用到时才建；测试给出自己的。"""

    given_engine: sa.Engine | None = None
    given_settings: EtlSettings | None = None

    @property
    def engine(self) -> sa.Engine:
        return self.given_engine or get_engine()

    @property
    def settings(self) -> EtlSettings:
        return self.given_settings or get_settings()


@dg.resource(description="The process's one engine and its settings (ETL_*): the database that ETL_DATABASE_URL names.")
def etl_database(_context: dg.InitResourceContext) -> EtlDatabase:
    """有名字，网页才说得出资源是什么；对象本身 Dagster 包成 `<lambda>`。"""
    return EtlDatabase()
