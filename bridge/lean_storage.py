"""工人写 Dagster 存储的省法：同样的表、同样的内容，不反复问表结构，不发没人听的通知，一个事件一个事务。

只在工人里用（dagster_adapter 把存储换成这里的类）；网页与守护进程照旧用 dagster-postgres。盖掉的都是 Dagster 私有的方法，
由 test_dagster_contract 看守。
"""

from __future__ import annotations

from typing import Any

from dagster import EventLogEntry
from dagster._core.events import ASSET_CHECK_EVENTS, ASSET_EVENTS
from dagster._core.storage.event_log import SqlEventLogStorageTable
from dagster_postgres.event_log import PostgresEventLogStorage
from dagster_postgres.run_storage import PostgresRunStorage


class LeanRunStorage(PostgresRunStorage):
    """表结构是 `dagster instance migrate` 之后的；快照按内容编号，存过就一直在。"""

    def has_run_stats_index_cols(self) -> bool:
        return True

    def has_backfill_id_column(self) -> bool:
        return True

    def _has_snapshot_id(self, snapshot_id: str) -> bool:
        known = self.__dict__.setdefault("_known_snapshots", set())
        if snapshot_id not in known and super()._has_snapshot_id(snapshot_id):
            known.add(snapshot_id)
        return snapshot_id in known

    def _get_snapshot(self, snapshot_id: str) -> Any:
        snapshots = self.__dict__.setdefault("_snapshots", {})
        if snapshot_id not in snapshots:
            found = super()._get_snapshot(snapshot_id)
            if found is None:
                return None
            snapshots[snapshot_id] = found
        return snapshots[snapshot_id]


class LeanEventLogStorage(PostgresEventLogStorage):
    """一个事件的行、它对资产的记录在同一个事务里。"""

    def has_asset_key_col(self, column_name: str) -> bool:  # noqa: ARG002  # 签名照 Dagster 的
        return True

    def _has_asset_key_col_on_connection(self, conn: Any, column_name: str) -> bool:  # noqa: ARG002  # 签名照 Dagster 的
        return True

    def has_table(self, table_name: str) -> bool:
        found = self.__dict__.setdefault("_found_tables", set())
        if table_name not in found and super().has_table(table_name):
            found.add(table_name)
        return table_name in found

    def store_event(self, event: EventLogEntry) -> None:
        occurred = event.dagster_event
        is_asset_event = occurred is not None and occurred.event_type in ASSET_EVENTS and occurred.asset_key is not None
        insert = self.prepare_insert_event(event).returning(SqlEventLogStorageTable.c.id)
        if is_asset_event:
            with self._engine.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
                event_id = connection.execute(insert).scalar_one()
                self._store_asset_event_tags(connection, [event], [event_id])
                self._store_asset_event(connection, event, event_id)
        else:
            with self._engine.connect() as connection:
                event_id = connection.execute(insert).scalar_one()
        if occurred is not None and occurred.event_type in ASSET_CHECK_EVENTS:
            self.store_asset_check_event(event, event_id)
