"""像真的那样的工人：Dagster 的存储也在 PostgreSQL 里。"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance

from bridge.runs.worker import RunWorker
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    create_dagster_storage,
    write_dagster_home,
)
from bridge.warm_dagster import instance as dagster_instance
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.instance import open_instance
from bridge.warm_dagster.internals import context_creation_job
from etl_assets.core.settings import EtlSettings


@contextmanager
def dagster_on_postgres(engine: sa.Engine, folder: Path) -> Iterator[DagsterInstance]:
    """真的存储，像工人那样打开，与数据在同一个数据库里；DAGSTER_HOME 在 folder 里。"""
    write_dagster_home(folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        silenced = dagster_instance._CONSOLE_LOGGERS  # 打开实例会换掉它，整个进程都受影响：之后换回来
        patch.setattr(context_creation_job, silenced, getattr(context_creation_job, silenced))
        patch.setenv("DAGSTER_HOME", str(folder / "home"))
        patch.setenv(
            "DAGSTER_POSTGRES_URL", build_dagster_postgres_url(engine.url.render_as_string(hide_password=False))
        )
        create_dagster_storage(
            engine, schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=folder / "migrate.log"
        )
        with open_instance() as instance:
            yield instance


@contextmanager
def warm_postgres_worker(
    location: CodeLocation, engine: sa.Engine, settings: EtlSettings, folder: Path
) -> Iterator[RunWorker]:
    """一个工人，它的 Dagster 存储与数据在同一个数据库里。"""
    with pytest.MonkeyPatch.context() as patch, dagster_on_postgres(engine, folder) as instance:
        patch.setattr("etl_assets.orchestration.resources.get_engine", lambda: engine)
        patch.setattr("etl_assets.orchestration.resources.get_settings", lambda: settings)
        worker = RunWorker(instance=instance, location=location, engine=engine, settings=settings, lease_seconds=30)
        yield worker
        worker.heartbeats.dispose()
