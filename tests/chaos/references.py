"""改店铺与类型映射的人：改了，就照说明书 `etl backfill` 全部的日子。数据库不在、写不了，就一直再试。"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from bridge.errors import BridgeError
from bridge.queue.doorbell import ring_workers
from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import normalize_url
from etl_assets.core.tables import order_type_mappings, shop_configs
from etl_assets.ledger.requests import request_days
from tests.chaos.house import DAYS

_PATIENCE_SECONDS = 180
_PAUSE_SECONDS = 0.5


class References:
    """一个数据库的店铺与类型映射。"""

    def __init__(self, database_url: str, bridge_settings: BridgeSettings) -> None:
        connect_args = {"options": "-cstatement_timeout=10s", "connect_timeout": 3, "application_name": "references"}
        self._engine = sa.create_engine(
            normalize_url(database_url), poolclass=sa.pool.NullPool, connect_args=connect_args
        )
        self._bridge_settings = bridge_settings

    def map_type(self, raw_type: str, system_type: str | None) -> None:
        """None 是不再映射。"""
        mapping = order_type_mappings.c
        if system_type is None:
            self._execute(sa.delete(order_type_mappings).where(mapping.raw_order_type == raw_type))
            return
        insert = pg.insert(order_type_mappings).values(raw_order_type=raw_type, system_order_type=system_type)
        self._execute(
            insert.on_conflict_do_update(
                index_elements=[mapping.raw_order_type], set_={"system_order_type": system_type}
            )
        )

    def rename_shop(self, name: str, new_name: str) -> None:
        self._execute(sa.update(shop_configs).where(shop_configs.c.shop_name == name).values(shop_name=new_name))

    def ask_for_whole_days(self) -> None:
        """门铃敲不响无妨：到期的日子有人找。"""
        _until_done(self._request_days)
        with suppress(BridgeError):
            asyncio.run(ring_workers(self._bridge_settings, "bulk"))

    def _request_days(self) -> None:
        with self._engine.begin() as connection:
            request_days(connection, "public", DAYS)

    def _execute(self, statement: sa.Executable) -> None:
        def change() -> None:
            with self._engine.begin() as connection:
                connection.execute(statement)

        _until_done(change)


def _until_done(work: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            work()
        except sa.exc.DBAPIError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return
