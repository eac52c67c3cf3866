"""工人写 Dagster 的运行：状态与时刻只改它们的列，按编号读一个运行只拼一次语句，快照记住。"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from dagster import DagsterEvent, DagsterEventType, DagsterRunStatus, RunRecord, RunsFilter
from dagster_postgres import PostgresRunStorage
from sqlalchemy.dialects import postgresql as pg

from bridge.warm_dagster.internals import (
    EVENT_TYPE_TO_PIPELINE_RUN_STATUS,
    FINISHED_STATUSES,
    DagsterRunAlreadyExists,
    RunsTable,
    RunTagsTable,
    SnapshotsTable,
)
from bridge.warm_dagster.storage_faults import noted


class _Own(threading.local):
    """每个线程自己的：刚改过状态的那一行；问清还在的快照，与几时问的。"""

    moved: sa.RowMapping | None = None
    existing: tuple[float, frozenset[str]] = (0.0, frozenset())


class LeanRunStorage(PostgresRunStorage):
    """表结构是 `dagster instance migrate` 之后的。"""

    def __init__(self, postgres_url: str, *, pool: sa.Engine, should_autocreate_tables: bool) -> None:
        self._own = _Own()
        self._snapshots: dict[str, Any] = {}
        self._asked: set[str] = set()
        super().__init__(postgres_url, should_autocreate_tables)
        self._engine = pool

    def connect(self) -> AbstractContextManager[sa.Connection]:
        return noted(super().connect())

    def has_backfill_id_column(self) -> bool:
        return True

    def handle_run_event(self, run_id: str, event: DagsterEvent, update_timestamp: datetime | None = None) -> None:
        """只改状态与时刻的列，不把整个运行读出来再写回去：读运行的人信 status 列，不信正文里的那个。

        停得比租约久的工人醒来时，别人已经给运行收了场：它晚到的事件留在日志里，不改结局。
        """
        status = EVENT_TYPE_TO_PIPELINE_RUN_STATUS.get(event.event_type)
        if status is None:
            return
        occurred = update_timestamp or datetime.now(UTC)
        values: dict[str, object] = {"status": status.value, "update_timestamp": occurred}
        if event.event_type is DagsterEventType.RUN_START:
            values["start_time"] = occurred.timestamp()
        if status in FINISHED_STATUSES:
            values["end_time"] = occurred.timestamp()
        before = _MAY_FOLLOW.get(status, _UNFINISHED)
        with self.connect() as connection:
            moved = (
                connection.execute(_update_run(tuple(values)), {"of_run": run_id, "before": before, **values})
                .mappings()
                .first()
            )
        self._own.moved = moved
        if moved and status is DagsterRunStatus.FAILURE:  # 还要写原因的标签
            self._own.moved = None
            super().handle_run_event(run_id, event, occurred)

    def get_run_records(
        self,
        filters: RunsFilter | None = None,
        limit: int | None = None,
        order_by: str | None = None,
        ascending: bool = False,
        cursor: str | None = None,
        bucket_by: Any = None,
    ) -> Sequence[RunRecord]:
        """按编号找一个运行，一个运行里要问几次：同样的查询，只拼一次。Dagster 改了状态接着就读它，改的那条语句已经读出来了。"""
        moved, self._own.moved = self._own.moved, None
        run_ids = filters.run_ids if filters else None
        if run_ids is None or len(run_ids) != 1 or filters != RunsFilter(run_ids=run_ids) or cursor or bucket_by:
            return super().get_run_records(filters, limit, order_by, ascending, cursor, bucket_by)
        row = moved
        if row is None or row["run_id"] != run_ids[0]:
            with self.connect() as connection:
                row = connection.execute(_RUN, {"of_run": run_ids[0]}).mappings().first()
        if row is None:
            return []
        created, updated = (row[name].replace(tzinfo=UTC) for name in ("create_timestamp", "update_timestamp"))
        run = self._row_to_run(dict(row))
        return [RunRecord(row["id"], run, created, updated, start_time=row["start_time"], end_time=row["end_time"])]

    def _core_add_run(self, col_values: dict[str, Any], tags: Mapping[str, str]) -> None:
        """运行与它的标签一条语句。"""
        own_tags = {"keys": list(tags), "tag_values": list(tags.values())}
        try:
            with self.connect() as connection:
                connection.execute(_add_run(tuple(col_values)), col_values | own_tags)
        except sa.exc.IntegrityError as error:
            raise DagsterRunAlreadyExists from error
        finally:
            self._own.existing = 0.0, frozenset()

    def has_execution_plan_snapshot(self, execution_plan_snapshot_id: str) -> bool:
        return self._has_snapshot_id(execution_plan_snapshot_id)

    def _has_snapshot_id(self, snapshot_id: str) -> bool:
        """建一个运行要问几个快照还在不在：有人也许清掉了它们。工人用的就那几个，一次问清，只作数到这个运行建好。"""
        asked_at, existing = self._own.existing
        if snapshot_id not in self._asked or time.monotonic() - asked_at > _ONE_CREATION_SECONDS:
            if len(self._asked) >= _SNAPSHOTS_KEPT:
                self._asked.clear()
            self._asked.add(snapshot_id)
            with self.connect() as connection:
                existing = frozenset(connection.scalars(_SNAPSHOTS, {"ids": sorted(self._asked)}))
            self._own.existing = time.monotonic(), existing
        return snapshot_id in existing

    def _add_snapshot(self, snapshot_id: str, snapshot_obj: Any, snapshot_type: Any) -> str:
        self._own.existing = 0.0, frozenset()
        return super()._add_snapshot(snapshot_id, snapshot_obj, snapshot_type)

    def _get_snapshot(self, snapshot_id: str) -> Any:
        """内容不会变。"""
        if self._snapshots.get(snapshot_id) is None:
            if len(self._snapshots) >= _SNAPSHOTS_KEPT:
                self._snapshots.clear()
            self._snapshots[snapshot_id] = super()._get_snapshot(snapshot_id)
        return self._snapshots[snapshot_id]


@lru_cache(maxsize=8)
def _add_run(names: tuple[str, ...]) -> sa.Insert:
    run = (
        sa.insert(RunsTable)
        .values({name: sa.bindparam(name) for name in names})
        .returning(RunsTable.c.run_id)
        .cte("run")
    )
    texts = [sa.cast(sa.bindparam(name), pg.ARRAY(sa.Text)) for name in ("keys", "tag_values")]
    tags = sa.func.unnest(*texts).table_valued("key", "value", name="tags").render_derived()
    return sa.insert(RunTagsTable).from_select(
        ["run_id", "key", "value"], sa.select(run.c.run_id, tags.c.key, tags.c.value).join_from(run, tags, sa.true())
    )


@lru_cache(maxsize=8)
def _update_run(names: tuple[str, ...]) -> sa.sql.dml.ReturningUpdate[Any]:
    is_before = RunsTable.c.status.in_(sa.bindparam("before", expanding=True))
    return (
        sa.update(RunsTable)
        .where(RunsTable.c.run_id == sa.bindparam("of_run"), is_before)
        .values({name: sa.bindparam(name) for name in names})
        .returning(*_RUN_COLUMNS)
    )


def _values(*statuses: DagsterRunStatus) -> tuple[str, ...]:
    return tuple(status.value for status in statuses)


_UNFINISHED = _values(*(status for status in DagsterRunStatus if status not in FINISHED_STATUSES))
_MAY_FOLLOW = {
    DagsterRunStatus.QUEUED: _values(DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED),
    DagsterRunStatus.STARTING: _values(
        DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING
    ),
    # 成功是真的，栅栏担保；那个失败是收尾的人以为它死了，或者醒来的人在别人重做时说的
    DagsterRunStatus.SUCCESS: (*_UNFINISHED, DagsterRunStatus.FAILURE.value),
}
"""这些状态只跟在哪些之后；别的只要运行没有结束。"""
_RUN_COLUMNS = RunsTable.c[
    "id", "run_id", "run_body", "status", "create_timestamp", "update_timestamp", "start_time", "end_time"
]
_RUN = sa.select(*_RUN_COLUMNS).where(RunsTable.c.run_id == sa.bindparam("of_run"))
_SNAPSHOTS_KEPT = 50
_ONE_CREATION_SECONDS = 1.0
_SNAPSHOTS = sa.select(SnapshotsTable.c.snapshot_id).where(
    SnapshotsTable.c.snapshot_id.in_(sa.bindparam("ids", expanding=True))
)
