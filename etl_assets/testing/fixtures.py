"""pytest 夹具：真 PostgreSQL 上的新数据库、Dagster 实例、原始数据、物化。

服务器是内嵌的；设了 ETL_TEST_DATABASE_URL 就用那一台（要有建库的权限）。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from dagster import AssetsDefinition, DagsterInstance, ExecuteInProcessResult, materialize

from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.services.vectorized_queries import read_frame
from etl_assets.testing.databases import cloned_database, template_database
from etl_assets.testing.raw_data import RawData

MaterializeDays = Callable[..., ExecuteInProcessResult]
ReadTable = Callable[[str], pl.DataFrame]


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """一台 PostgreSQL 的地址，整个测试会话共用。"""
    if given := os.environ.get("ETL_TEST_DATABASE_URL"):
        yield given
        return
    folder: Path = tmp_path_factory.mktemp("postgres")
    with EmbeddedPostgres(folder / "server", durable=False) as url:
        yield url


@pytest.fixture(scope="session")
def database_template(postgres_url: str) -> Iterator[str]:
    """迁移到最新的模板数据库的名字。"""
    with template_database(postgres_url) as name:
        yield name


@pytest.fixture
def etl_settings(postgres_url: str, database_template: str) -> Iterator[EtlSettings]:
    """指向一个全新数据库的设置，其余都是缺省值。"""
    with cloned_database(postgres_url, database_template) as url:
        yield EtlSettings(database_url=url)


@pytest.fixture
def engine(etl_settings: EtlSettings) -> Iterator[sa.Engine]:
    """全新数据库上的引擎。"""
    engine = build_engine(etl_settings)
    yield engine
    engine.dispose()


@pytest.fixture
def raw_data(engine: sa.Engine) -> RawData:
    """有一个店铺与三种订单类型的数据库，可以往里加导入。"""
    return RawData(engine)


@pytest.fixture
def dagster_instance() -> Iterator[DagsterInstance]:
    """内存里的 Dagster 实例。"""
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def materialize_days(
    etl_settings: EtlSettings, engine: sa.Engine, dagster_instance: DagsterInstance
) -> MaterializeDays:
    """`materialize_days([orders], first, last)`：像 Dagster 那样物化这些天。"""

    def run(assets: Sequence[AssetsDefinition], first: date, last: date | None = None) -> ExecuteInProcessResult:
        return materialize(
            list(assets),
            instance=dagster_instance,
            resources={"database": EtlDatabase(engine, etl_settings)},
            tags={
                "dagster/asset_partition_range_start": first.isoformat(),
                "dagster/asset_partition_range_end": (last or first).isoformat(),
            },
        )

    return run


@pytest.fixture
def read_table(engine: sa.Engine) -> ReadTable:
    """`read_table(名字)`：一张表的全部行，按主键排序，去掉 created_at 与 updated_at。"""

    def read(name: str) -> pl.DataFrame:
        with engine.connect() as connection:
            table = sa.Table(name, sa.MetaData(), autoload_with=connection)
            columns = [column for column in table.c if column.name not in ("created_at", "updated_at")]
            return read_frame(connection, sa.select(*columns).order_by(*table.primary_key.columns))

    return read
