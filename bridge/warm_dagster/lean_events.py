"""工人写 Dagster 的事件：攒成几批，不发没人听的通知；运行自己要读回去的由记住的来答。"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

import sqlalchemy as sa
from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInvariantViolationError,
    EventLogEntry,
    EventLogRecord,
)
from dagster_postgres import PostgresEventLogStorage
from sqlalchemy.dialects import postgresql as pg

from bridge.warm_dagster.internals import (
    ASSET_CHECK_EVENTS,
    ASSET_EVENTS,
    ASSET_KEY_INDEX_COLS,
    PIPELINE_EVENTS,
    AssetCheckExecutionsTable,
    AssetEntry,
    AssetKeyTable,
    AssetRecord,
    EventRecordsResult,
    SqlEventLogStorageTable,
)
from bridge.warm_dagster.storage_faults import noted
from etl_assets.core.database_sync import execute_compiled

_Item = TypeVar("_Item", EventLogEntry, EventLogRecord)


class _Joining(threading.local):
    """这个线程要并进去的那条消息。"""

    connection: Any = None


class LeanEventLogStorage(PostgresEventLogStorage):
    """一个运行的事件攒成几批写：先是事件，一条语句，写下就看得见；再是它们对资产与检查的记录，一个事务。

    攒着的与写着的是两件事：写要等数据库，攒从不等它。
    """

    def __init__(self, postgres_url: str, *, pool: sa.Engine, should_autocreate_tables: bool) -> None:
        self._counting = threading.Lock()
        self._flushing = threading.RLock()
        self._flusher: int | None = None
        self._waiting: list[EventLogEntry] = []
        self._unrecorded: list[EventLogRecord] = []
        self._deferring = 0
        self._made: dict[AssetKey, dict[str, EventLogRecord]] = {}
        self._joining = _Joining()
        self._found_tables: set[str] = set()
        super().__init__(postgres_url, should_autocreate_tables)
        self._engine = pool

    @contextmanager
    def deferring(self, *, is_continued: bool = False) -> Iterator[None]:
        """期间的事件先攒着：等到运行的状态变了、本进程要读而其中有物化、有人调用 flush、或者离开时一起写。

        进程这时死去，丢的是最后四分之一秒的日志；运行的状态与写进表里的数据从不在其中。

        :param is_continued: 马上还要再来一次：离开时不写。
        """
        with self._counting:
            self._deferring += 1
        try:
            yield
        finally:
            with self._counting:
                self._deferring -= 1
            self._made.clear()
            try:
                if not is_continued:
                    self.flush()
            except BaseException:
                self._give_up()
                raise

    def _give_up(self) -> None:
        """写不成的，没有人再来写；别的线程还在攒，就由它写。正写着的写完再清：它按个数从头上删。"""
        with self._flushing, self._counting:
            if not self._deferring:
                self._waiting.clear()
                self._unrecorded.clear()

    def store_event(self, event: EventLogEntry) -> None:
        if not self._deferring:
            if self._waiting:  # 建好了运行，却没有接着执行
                self.flush()
            self._record(self._insert([event]))
            return
        self._waiting.append(event)
        if event.dagster_event_type in _URGENT:
            self.flush()

    def store_event_batch(self, events: Sequence[EventLogEntry]) -> None:
        """网页建一个运行时计划的那些，一起写；写不成的，Dagster 自己再一个一个写。"""
        if self._deferring or self._waiting:  # 正攒着的不能被越过
            for event in events:
                self.store_event(event)
        else:
            self._record(self._insert(events))

    def flush(self, *, and_record: bool = True) -> None:
        """写下攒着的，次序照旧；写不成就抛错，还在攒的时候下一次再写。谁都可以调用，等数据库的只有调用的人。

        :param and_record: 假的只写事件，它们对资产与检查的记录等下一次。
        """
        with self._flushing:
            self._flusher = threading.get_ident()
            try:
                # 切下来的是拷贝：写着的时候，别的线程照样往后添，所以划掉时按个数从头删
                while events := self._waiting[:_AT_ONCE]:
                    _write_what_is_accepted(self._insert_waiting, events, self._replace)
                while and_record and (records := self._unrecorded[:_AT_ONCE]):
                    _write_what_is_accepted(self._record_waiting, records, self._leave_unrecorded)
            finally:
                self._flusher = None

    def _insert_waiting(self, events: Sequence[EventLogEntry]) -> None:
        records = self._insert(events)
        # 先记住、记上，再划掉：别的线程先看攒着的、再看没记的，总有一处看得见
        for record in records:
            self._remember(record)
        self._unrecorded += records
        del self._waiting[: len(events)]

    def _record_waiting(self, records: Sequence[EventLogRecord]) -> None:
        self._record(records)
        del self._unrecorded[: len(records)]

    def _replace(self, event: EventLogEntry, error: Exception) -> None:
        """内容写不下的事件，换成说明它的一行日志：一个坏的不连累别的。"""
        self._insert([_line_about(event, error, "could not be stored")])
        del self._waiting[0]

    def _leave_unrecorded(self, record: EventLogRecord, error: Exception) -> None:
        self._insert([_line_about(record.event_log_entry, error, "is stored, but not in the records of its asset")])
        del self._unrecorded[0]

    def _insert(self, events: Sequence[EventLogEntry]) -> list[EventLogRecord]:
        """一条语句，自己提交：编号发出去到看得见之间越短，跟着编号读的人漏掉的越少。"""
        rows = [self._event_to_row(event) for event in events]
        with self._connect() as connection:
            ids = connection.scalars(_INSERT, rows).all()
        return [EventLogRecord(event_id, event) for event_id, event in zip(ids, events, strict=True)]

    def _record(self, records: Sequence[EventLogRecord]) -> None:
        """事件之外它们还要写的：标签、资产、检查，一次往返、一个事务。"""
        of_assets = [record for record in records if _is_of_asset(record.event_log_entry)]
        of_checks = [record for record in records if record.event_log_entry.dagster_event_type in ASSET_CHECK_EVENTS]
        if not of_assets and not of_checks:
            return
        with self._connect() as connection:
            message: Any = _Message(connection)  # Dagster 当它是连接
            entries, ids = [record.event_log_entry for record in of_assets], [record.storage_id for record in of_assets]
            self._store_asset_event_tags(message, entries, ids)
            self._update_assets(message, of_assets)
            with self._joined(message):
                for record in of_checks:
                    self.store_asset_check_event(record.event_log_entry, record.storage_id)
            message.send()

    def _update_asset_check_evaluation(self, event: EventLogEntry, event_id: int | None) -> None:
        """先让计划的那一行在：Dagster 要看改到没有，而这些语句一起发，还没有结果可看。"""
        evaluation = event.get_dagster_event().asset_check_evaluation_data
        planned = {
            "of_asset": evaluation.asset_key.to_string(),
            "of_check": evaluation.check_name,
            "of_partition": evaluation.partition,
            "of_run": event.run_id,
        }
        with self.index_connection() as connection:
            execute_compiled(connection, _PLAN_CHECK, planned)
        super()._update_asset_check_evaluation(event, event_id)

    def _update_assets(self, connection: sa.Connection, records: Sequence[EventLogRecord]) -> None:
        """一个资产一行，合起来是一个一个写的结果；次序固定，几个进程同时写不会互相锁死。"""
        newest = {(_asset_of(record), record.event_log_entry.dagster_event_type): record for record in records}
        rows: dict[str, dict[str, Any]] = {}
        for (asset_key, _), record in sorted(newest.items(), key=lambda item: item[1].storage_id):
            is_indexed = self.has_secondary_index(ASSET_KEY_INDEX_COLS)
            values = self._get_asset_entry_values(record.event_log_entry, record.storage_id, is_indexed)
            rows.setdefault(asset_key, {"asset_key": asset_key}).update(values)
        for _, row in sorted(rows.items()):
            execute_compiled(connection, _upsert_asset(tuple(row)), row)

    def _flush_made(self, *, and_record: bool = True) -> None:
        """攒着的物化谁要读就先写下；别的事件接着攒。

        :param and_record: 假的表示多半由记住的来答，不读资产与检查的记录；真要读时还会再问一次。
        """
        if self._flusher == threading.get_ident():
            return
        if any(event.dagster_event_type in _READ_BACK for event in list(self._waiting)) or (
            and_record and self._unrecorded
        ):
            self.flush(and_record=and_record)

    def _connect(self) -> AbstractContextManager[sa.Connection]:
        self._flush_made()
        return noted(super()._connect())

    def _remember(self, record: EventLogRecord) -> None:
        """记住这个运行物化的分区：下一步要写下上游的版本，不必为刚写的再查几次。"""
        made = record.event_log_entry.asset_materialization
        if self._deferring and made is not None and made.partition is not None:
            self._made.setdefault(made.asset_key, {})[made.partition] = record

    def get_asset_records(self, asset_keys: Sequence[AssetKey] | None = None) -> Sequence[AssetRecord]:
        """这个运行里刚物化的，只给出它最近的物化：运行之中只有记上游版本的一处来问。"""
        self._flush_made(and_record=False)
        made = [(key, self._made.get(key)) for key in asset_keys or ()]
        if not made or not all(partitions for _, partitions in made):
            return self._with_observations(super().get_asset_records(asset_keys))
        newest = [
            (key, max(partitions.values(), key=lambda record: record.storage_id))
            for key, partitions in made
            if partitions
        ]
        return [
            AssetRecord(
                storage_id=record.storage_id, asset_entry=AssetEntry(asset_key=key, last_materialization_record=record)
            )
            for key, record in newest
        ]

    def _with_observations(self, records: Sequence[AssetRecord]) -> Sequence[AssetRecord]:
        """没有物化过的，版本是最近一次观察的。Dagster 每一步为每个来源各查一次；这里先一次问清哪些有过。"""
        keys = [record.asset_entry.asset_key.to_string() for record in records]
        bare = [
            key
            for key, record in zip(keys, records, strict=True)
            if record.asset_entry.last_materialization_record is None
        ]
        if not bare:
            return records
        with self.index_connection() as connection:
            dated = set(connection.scalars(_DATED_ASSETS, {"asset_keys": bare}))
        return [
            self._with_observation(record) if key in dated else record
            for key, record in zip(keys, records, strict=True)
        ]

    def _with_observation(self, record: AssetRecord) -> AssetRecord:
        entry = record.asset_entry
        observed = next(iter(self.fetch_observations(entry.asset_key, limit=1).records), None)
        entry = AssetEntry(
            asset_key=entry.asset_key,
            last_run_id=entry.last_run_id,
            asset_details=entry.asset_details,
            cached_status=entry.cached_status,
            last_observation_record=observed,
        )
        return AssetRecord(storage_id=record.storage_id, asset_entry=entry)

    def fetch_materializations(
        self,
        records_filter: AssetKey | AssetRecordsFilter,
        limit: int,
        cursor: str | None = None,
        ascending: bool = False,
    ) -> EventRecordsResult:
        """检查要指着的物化，多半是这一步刚写的。"""
        self._flush_made(and_record=False)
        if isinstance(records_filter, AssetRecordsFilter) and cursor is None and not ascending:
            made, partitions = self._made.get(records_filter.asset_key, {}), records_filter.asset_partitions or ()
            of_partitions = AssetRecordsFilter(records_filter.asset_key, partitions)
            if len(partitions) == limit and made.keys() >= set(partitions) and records_filter == of_partitions:
                newest_first = sorted(
                    (made[partition] for partition in partitions), key=lambda record: -record.storage_id
                )
                return EventRecordsResult(newest_first, cursor="", has_more=False)
        return super().fetch_materializations(records_filter, limit, cursor, ascending)

    def get_latest_tags_by_partition(
        self,
        asset_key: AssetKey,
        event_type: DagsterEventType,
        tag_keys: Sequence[str],
        asset_partitions: Sequence[str] | None = None,
        before_cursor: int | None = None,
        after_cursor: int | None = None,
    ) -> Mapping[str, Mapping[str, str]]:
        """这个运行占着的日子，没有别人会物化：自己写的就是最新的。"""
        self._flush_made(and_record=False)
        made = self._made.get(asset_key, {})
        if (
            event_type is not DagsterEventType.ASSET_MATERIALIZATION
            or not asset_partitions
            or not made.keys() >= set(asset_partitions)
            or before_cursor is not None
            or after_cursor is not None
        ):
            return super().get_latest_tags_by_partition(
                asset_key, event_type, tag_keys, asset_partitions, before_cursor, after_cursor
            )
        tags = {
            partition: self._tags_for_asset_event(made[partition].event_log_entry) for partition in asset_partitions
        }
        return {
            partition: {key: own[key] for key in tag_keys}
            for partition, own in tags.items()
            if own.keys() >= set(tag_keys)
        }

    @contextmanager
    def _joined(self, connection: Any) -> Iterator[None]:
        self._joining.connection = connection
        try:
            yield
        finally:
            self._joining.connection = None

    def index_connection(self) -> AbstractContextManager[sa.Connection]:
        """检查的记录与资产的一起写，再写一次也不会重；Dagster 在那里自己借连接。"""
        joining = self._joining.connection
        return nullcontext(joining) if joining is not None else super().index_connection()

    @property
    def asset_records_have_last_observation(self) -> bool:
        """get_asset_records 给出它们。"""
        return True

    def _has_asset_key_col_on_connection(self, conn: Any, column_name: str) -> bool:  # noqa: ARG002  # 签名照 Dagster 的
        return True

    def has_table(self, table_name: str) -> bool:
        if table_name not in self._found_tables and super().has_table(table_name):
            self._found_tables.add(table_name)
        return table_name in self._found_tables


class _Message:
    """当作连接用的：几条语句攒成一条消息，一次往返，也是一个事务。psycopg2 总是在这一边绑定参数，所以一条消息装得下几条语句。"""

    def __init__(self, connection: sa.Connection) -> None:
        self.dialect = connection.dialect
        self._connection = connection
        self._cursor = connection.connection.cursor()
        self._statements: list[str] = []

    def execute(
        self, statement: sa.Insert | sa.Update, rows: Sequence[Mapping[str, Any]] | None = None
    ) -> SimpleNamespace:
        whole = statement.values(rows) if rows is not None and isinstance(statement, sa.Insert) else statement
        compiled = whole.compile(dialect=self.dialect)
        return self.exec_driver_sql(str(compiled), compiled.construct_params())

    def exec_driver_sql(self, statement: str, parameters: Mapping[str, Any]) -> SimpleNamespace:
        self._statements.append(self._cursor.mogrify(statement, parameters).decode())
        return SimpleNamespace(rowcount=1)  # 还没有发出去，Dagster 要看的只有这一样

    def send(self) -> None:
        self._connection.exec_driver_sql("; ".join(self._statements).replace("%", "%%"))


def _write_what_is_accepted(
    write: Callable[[Sequence[_Item]], None], items: Sequence[_Item], refuse: Callable[[_Item, Exception], None]
) -> None:
    """一起写；其中有内容写不下的，就对半分开再写，直到只剩它自己。"""
    try:
        write(items)
    except Exception as error:
        if not _is_about_content(error):
            raise
        if len(items) == 1:
            refuse(items[0], error)
            return
        half = len(items) // 2
        for part in (items[:half], items[half:]):
            _write_what_is_accepted(write, part, refuse)


def _is_about_content(error: Exception) -> bool:
    """是写的内容不行；数据库不在、没有表、没有权、有锁，都与内容无关，以后再写。"""
    if isinstance(error, sa.exc.DBAPIError):
        return str(getattr(error.orig, "pgcode", None))[:2] in _CONTENT_SQLSTATES
    own = ValueError, TypeError, ArithmeticError, RecursionError, sa.exc.StatementError, DagsterInvariantViolationError
    return isinstance(error, own)


def _line_about(event: EventLogEntry, error: Exception, what: str) -> EventLogEntry:
    kind = event.dagster_event_type.value if event.dagster_event_type else "log line"
    made = event.dagster_event.asset_key if event.dagster_event else None
    about = f"{kind} of {made.to_user_string()}" if made else kind
    reason = str(error).partition("\n")[0]
    text = f"{about} {what}: {type(error).__name__}: {reason}. What the run wrote to its tables is not affected."
    return event._replace(
        level=logging.ERROR,
        user_message=text,
        timestamp=time.time(),
        step_key=None,
        error_info=None,
        dagster_event=None,
    )


def _is_of_asset(event: EventLogEntry) -> bool:
    return event.dagster_event_type in ASSET_EVENTS and event.get_dagster_event().asset_key is not None


def _asset_of(record: EventLogRecord) -> str:
    asset_key = record.event_log_entry.get_dagster_event().asset_key
    assert asset_key is not None  # noqa: S101  # 由 _is_of_asset 选出
    return asset_key.to_string()


@lru_cache(maxsize=8)
def _upsert_asset(names: tuple[str, ...]) -> sa.Insert:
    insert = pg.insert(AssetKeyTable).values({name: sa.bindparam(name) for name in names})
    changed = {name: insert.excluded[name] for name in names if name != "asset_key"}
    on_asset = [AssetKeyTable.c.asset_key]
    return (
        insert.on_conflict_do_update(index_elements=on_asset, set_=changed)
        if changed
        else insert.on_conflict_do_nothing()
    )


_CHECK = {name: sa.bindparam(f"of_{name}", type_=sa.Text) for name in ("asset", "check", "partition", "run")}
_PLANNED = sa.select(AssetCheckExecutionsTable.c.id).where(
    AssetCheckExecutionsTable.c.asset_key == _CHECK["asset"],
    AssetCheckExecutionsTable.c.check_name == _CHECK["check"],
    AssetCheckExecutionsTable.c.partition.is_not_distinct_from(_CHECK["partition"]),
    AssetCheckExecutionsTable.c.run_id == _CHECK["run"],
)
_PLAN_CHECK = sa.insert(AssetCheckExecutionsTable).from_select(
    ["asset_key", "check_name", "partition", "run_id", "execution_status"],
    sa.select(*_CHECK.values(), sa.literal_column("'PLANNED'")).where(~_PLANNED.exists()),
)
_DATED_ASSETS = sa.select(AssetKeyTable.c.asset_key).where(
    AssetKeyTable.c.asset_key.in_(sa.bindparam("asset_keys", expanding=True)),
    AssetKeyTable.c.last_materialization_timestamp.is_not(None),
)
"""物化、计划、观察都留下时刻；守护进程给来源记的新鲜程度不留。"""
_INSERT = SqlEventLogStorageTable.insert().returning(SqlEventLogStorageTable.c.id, sort_by_parameter_order=True)
_AT_ONCE = 500
"""SQLAlchemy 一条 INSERT 至多一千行：再多就是几条，各自提交。"""
_CONTENT_SQLSTATES = {"22", "23", "54"}
_URGENT = PIPELINE_EVENTS - {DagsterEventType.RUN_START}
"""运行的状态说完了，它的事件就该都在。"""
_READ_BACK = {DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.ASSET_OBSERVATION}
"""运行自己会读回去的：下游记上游的版本，检查指着它。"""
