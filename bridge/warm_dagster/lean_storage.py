"""工人、网页与守护进程写 Dagster 存储的省法：同样的表、同样的内容，三个存储共用一个连接池，不反复问表结构，一个事件一个事务。

打开实例时它是 Dagster 的自定义存储（`storage: custom`）。
盖掉的都是 Dagster 私有的方法，由 test_dagster_contract 看守。
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from dagster_postgres import DagsterPostgresStorage, PostgresScheduleStorage

from bridge.warm_dagster.internals import (
    ConfigurableClassData,
    create_pg_engine,
    get_token_provider_from_config,
    pg_url_from_config,
)
from bridge.warm_dagster.lean_events import LeanEventLogStorage
from bridge.warm_dagster.lean_runs import LeanRunStorage
from etl_assets.core.database_sync import ping_idle_connections, replace_read_only_sessions
from etl_assets.core.silent_connections import SilenceWatch, libpq_patience

_POOL_SIZE = 2
_MOST_AT_ONCE = 12
"""守护进程有五六个线程，一个可以同时要两个连接；多出来的用完就关。"""
_LONGEST_WAIT_SECONDS = 600.0
"""Dagster 的存储没有一条语句要做这么久；等锁的不算。"""


class LeanStorage(DagsterPostgresStorage):
    """dagster-postgres 每条语句新建一个连接；这里三个存储共用一个连接池。设置照 dagster-postgres 的。"""

    def __init__(self, inst_data: ConfigurableClassData | None, config: Mapping[str, Any]) -> None:
        url, creates_tables = pg_url_from_config(config), config.get("should_autocreate_tables", True)
        # 它建的三个从不连接；有没有表，由下面的三个去看
        super().__init__(url, should_autocreate_tables=False, inst_data=inst_data)
        pool = create_pg_engine(
            url,
            get_token_provider_from_config(config),
            isolation_level="AUTOCOMMIT",
            pool_size=_POOL_SIZE,
            max_overflow=_MOST_AT_ONCE - _POOL_SIZE,
            pool_use_lifo=True,
            connect_args=libpq_patience(sa.make_url(url)),
        )
        SilenceWatch(pool, limit_seconds=_LONGEST_WAIT_SECONDS)
        ping_idle_connections(pool)
        replace_read_only_sessions(pool)
        self._run_storage = LeanRunStorage(url, pool=pool, should_autocreate_tables=creates_tables)
        self._event_log_storage = LeanEventLogStorage(url, pool=pool, should_autocreate_tables=creates_tables)
        self._schedule_storage = PostgresScheduleStorage(url, creates_tables)
        self._schedule_storage._engine = pool

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> LeanStorage:
        return cls(inst_data, config_value)
