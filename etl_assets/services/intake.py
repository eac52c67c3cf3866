"""导入事件进台账：哪些天受一次导入影响，一条查询答完一批；没有分区可去的坏行也在这里记下。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import psycopg.errors
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange, local_day, partition_range
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import (
    TIMESTAMP,
    import_events,
    import_requests,
    import_tasks,
    ledger,
    order_id_key,
    raw_orders,
    rejected_rows,
    target_tables,
    trimmed,
    waiting_events,
)
from etl_assets.services import raw_rows
from etl_assets.services.ledger import ASSETS, request_days
from etl_assets.services.locks import lock_days, lock_imports

_PATIENCE = "20ms"
NO_SEQUENCE = 0
"""不是流里的事件：没有人宣布的导入要求不了，像事件那样等着。流的序号从 1 起。"""

Outcome = Literal["requested", "known", "irrelevant", "pending", "missing"]
"""requested：已要求受影响的日子；known：同一事件先前已处理；irrelevant：撤回的导入从未入表；
pending、missing：导入还没完成、还没有。"""


@dataclass(frozen=True)
class ImportEvent:
    """说一次导入完成或撤回的事件；范围以 import_tasks 的行为准。sequence 是它在流里的序号，stored_at 是流存下它的时刻。"""

    import_id: UUID
    event_id: UUID
    allow_deletes: bool = False
    sequence: int | None = None
    stored_at: datetime | None = None


def request_imports(engine: sa.Engine, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """在一个事务里处理一批事件，逐个给出结果；导入还没完成的记下来，提交之后就可以确认。"""
    with engine.begin() as connection:
        outcomes = take_in(connection, settings, events)
        remember_waiting(
            connection,
            settings.target_schema,
            [event for event, outcome in zip(events, outcomes, strict=True) if outcome in ("pending", "missing")],
        )
        return outcomes


def take_in(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """锁住这些导入，决定每个事件该怎么办，要求受影响的日子。"""
    lock_imports(connection, settings.target_schema, (event.import_id for event in events))
    outcomes = decide_outcomes(connection, settings, events)
    requested = [event for event, outcome in zip(events, outcomes, strict=True) if outcome == "requested"]
    if requested:
        request_affected_days(connection, settings, requested)
    return outcomes


def decide_outcomes(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """每个事件该怎么办；导入的锁由调用者先拿好。"""
    import_ids = sorted({event.import_id for event in events})
    known = connection.execute(_KNOWN_IMPORTS, {"of_target": settings.target_schema, "import_ids": import_ids}).all()
    statuses = {row.import_id: row.status for row in known if row.status is not None}
    handled = {row.import_id: row.event_id for row in known if row.event_id is not None}
    withdrawn = [import_id for import_id in import_ids if statuses.get(import_id) == "failed"]
    in_tables = _in_tables(connection, settings, withdrawn) if withdrawn else set()
    unseen = [import_id for import_id in withdrawn if import_id not in in_tables and import_id not in handled]
    if unseen:
        in_tables |= _in_tables_or_in_a_run(connection, settings, unseen)

    def decide(event: ImportEvent) -> Outcome:
        match statuses.get(event.import_id):
            case None:
                return "missing"
            case "completed" | "failed" if handled.get(event.import_id) == event.event_id:
                return "known"
            case "completed" | "failed" if event.sequence == NO_SEQUENCE and event.import_id in handled:
                return "known"  # 没有人宣布的，后来有人宣布了
            case "completed":
                return "requested"
            case "failed":
                # 先前要求过的导入可能有运行还要写它，那时表里看不到它
                return "requested" if event.import_id in in_tables or event.import_id in handled else "irrelevant"
            case _:
                return "pending"

    return [decide(event) for event in events]


def has_traces(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> bool:
    """撤回的导入在表里还有行、拒收记录，或者可能有运行正写着它。"""
    return bool(_in_tables(connection, settings, [import_id]) or _in_tables_or_in_a_run(connection, settings, [import_id]))


def _in_tables(connection: sa.Connection, settings: EtlSettings, import_ids: Sequence[UUID]) -> set[UUID]:
    """有行在 orders 里、或有拒收记录的导入：没有事件也可能做过（有人重算了那些天）。"""
    orders = target_tables(settings.target_schema).orders
    rejected = sa.and_(rejected_rows.c.target == settings.target_schema, rejected_rows.c.import_id == sa.any_(_IMPORT_IDS))
    loaded = sa.select(orders.c.import_id).where(orders.c.import_id == sa.any_(_IMPORT_IDS))
    in_tables = loaded.union(sa.select(rejected_rows.c.import_id).where(rejected))
    return set(connection.scalars(in_tables, {"import_ids": list(import_ids)}))


def _in_tables_or_in_a_run(connection: sa.Connection, settings: EtlSettings, import_ids: Sequence[UUID]) -> set[UUID]:
    """先占住这些导入的业务日，再看哪些在表里：往后的运行都看得到撤回。

    占不住，就有运行正写着那些日子，它可能在撤回之前读到了它们：当作都在，不等它。
    """
    day = local_day(raw_orders.c.ordered_at, settings.timezone).label("day")
    days = sa.select(day).where(raw_orders.c.import_id == sa.any_(_IMPORT_IDS)).distinct().subquery("days")
    in_partitions = partition_range(settings).includes(days.c.day)
    wanted = connection.scalars(sa.select(days.c.day).where(in_partitions), {"import_ids": list(import_ids)}).all()
    patience = connection.scalar(sa.select(sa.func.current_setting("lock_timeout")))
    try:
        with connection.begin_nested():
            connection.execute(sa.select(sa.func.set_config("lock_timeout", _PATIENCE, sa.true())))
            lock_days(connection, settings.target_schema, wanted)
            connection.execute(sa.select(sa.func.set_config("lock_timeout", patience, sa.true())))
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            return set(import_ids)
        raise
    return _in_tables(connection, settings, import_ids)


def request_affected_days(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> set[date]:
    """要求这些导入影响的日子，记下是哪个事件要求的；返回那些日子。"""
    target = settings.target_schema
    import_ids = sorted({event.import_id for event in events})
    raw_rows.reject_rows_without_partition(connection, settings, import_ids)
    affected = read_affected_days(connection, settings, import_ids)
    deleting = {event.import_id for event in events if event.allow_deletes}
    deletes_allowed_on = {day for import_id, day in affected if import_id in deleting}
    request_days(connection, target, {day for _, day in affected}, deletes_allowed_on=deletes_allowed_on)
    _remember_requests(connection, target, affected)
    _remember_events(connection, target, events)
    return {day for _, day in affected}


def read_affected_days(connection: sa.Connection, settings: EtlSettings, import_ids: Sequence[UUID]) -> list[tuple[UUID, date]]:
    """每个导入影响的业务日：它点名的订单在任何完成的导入里的全部版本，加上它自己的行（坏行也要上账）。

    只看存在的分区；撤回的导入自己的版本也算。
    """
    statement = _affected_days(settings.timezone, partition_range(settings))
    return [(import_id, day) for import_id, day in connection.execute(statement, {"import_ids": list(import_ids)})]


def _remember_requests(connection: sa.Connection, target: str, affected: Sequence[tuple[UUID, date]]) -> None:
    """记下每个导入在哪一天要求了哪个版本：`etl wait` 与完成事件的 import_ids 由此而来。"""
    pairs = {"import_ids": [import_id for import_id, _ in affected], "days": [day for _, day in affected]}
    execute_compiled(connection, _REMEMBER_REQUESTS, {"of_target": target, **pairs})


def _remember_events(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> None:
    """记下每个导入最新的事件，整批一条语句。"""
    newest = sorted({event.import_id: event for event in events}.items())
    rows = {
        "import_ids": [import_id for import_id, _ in newest],
        "event_ids": [event.event_id for _, event in newest],
        "sequences": [event.sequence for _, event in newest],
    }
    execute_compiled(connection, _REMEMBER_EVENTS, {"of_target": target, **rows})


def remember_waiting(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> None:
    """记下要等导入的事件；不是从流里来的没有期限可言，不记。"""
    newest = {(event.import_id, event.event_id): event for event in events if event.sequence is not None and event.stored_at is not None}
    if not newest:
        return
    stored = newest.values()
    rows = {
        "import_ids": [event.import_id for event in stored],
        "event_ids": [event.event_id for event in stored],
        "allow_deletes": [event.allow_deletes for event in stored],
        "sequences": [event.sequence for event in stored],
        "stored_ats": [event.stored_at for event in stored],
    }
    execute_compiled(connection, _REMEMBER_WAITING, {"of_target": target, **rows})


# ---- 每批事件都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_TARGET = sa.bindparam("of_target", type_=sa.Text)
_IMPORT_IDS = sa.bindparam("import_ids", type_=sa.ARRAY(sa.Uuid))


def _unnest(name: str, **columns: sa.BindParameter[Any]) -> sa.TableValuedAlias:
    """几个一样长的数组并成一张表。"""
    return sa.func.unnest(*columns.values()).table_valued(*columns, name=name).render_derived()


_WANTED = _unnest("wanted", import_id=_IMPORT_IDS)
_KNOWN_IMPORTS = (
    sa.select(_WANTED.c.import_id, import_tasks.c.status, import_events.c.event_id)
    .select_from(_WANTED)
    .outerjoin(import_tasks, import_tasks.c.import_id == _WANTED.c.import_id)
    .outerjoin(import_events, sa.and_(import_events.c.import_id == _WANTED.c.import_id, import_events.c.target == _TARGET))
)


@lru_cache(maxsize=8)
def _affected_days(timezone: str, partitions: DayRange) -> sa.Select[tuple[UUID, date]]:
    named_row = raw_orders.alias("named_row")
    version = raw_orders.alias("version")
    named = (
        sa.select(named_row.c.import_id, order_id_key(named_row.c.order_id).label("order_id"), trimmed(named_row.c.shop).label("shop"))
        .where(named_row.c.import_id == sa.any_(_IMPORT_IDS))
        .distinct()
        .subquery("named")
    )
    # OFFSET 0：先连接，再筛。筛的条件规划器估不准（没有统计时以为只剩一行），会选嵌套循环，几千行就要几秒
    versions = (
        sa.select(named.c.import_id, version.c.import_id.label("version_import_id"), version.c.ordered_at)
        .select_from(named)
        .join(version, sa.and_(order_id_key(version.c.order_id) == named.c.order_id, trimmed(version.c.shop) == named.c.shop))
        .offset(0)
        .subquery("versions")
    )
    of_versions = (
        sa.select(versions.c.import_id, local_day(versions.c.ordered_at, timezone).label("day"))
        .join(import_tasks, import_tasks.c.import_id == versions.c.version_import_id)
        .where(raw_rows.IN_SCOPE)
    )
    own = sa.select(raw_orders.c.import_id, local_day(raw_orders.c.ordered_at, timezone)).where(
        raw_orders.c.import_id == sa.any_(_IMPORT_IDS)
    )
    days = of_versions.union(own).subquery("days")
    return sa.select(days.c.import_id, days.c.day).where(partitions.includes(days.c.day))


def _remember_requests_statement() -> pg.Insert:
    pair = _unnest("pair", import_id=_IMPORT_IDS, day=sa.bindparam("days", type_=sa.ARRAY(sa.Date)))
    own = sa.and_(ledger.c.target == _TARGET, ledger.c.asset == ASSETS[0], ledger.c.day == pair.c.day)
    rows = sa.select(_TARGET, pair.c.import_id, pair.c.day, ledger.c.requested).select_from(pair).join(ledger, own)
    insert = pg.insert(import_requests).from_select(["target", "import_id", "day", "revision"], rows)
    return insert.on_conflict_do_update(index_elements=["target", "import_id", "day"], set_={"revision": insert.excluded.revision})


def _remember_events_statement() -> pg.Insert:
    event_ids, sequences = sa.bindparam("event_ids", type_=sa.ARRAY(sa.Uuid)), sa.bindparam("sequences", type_=sa.ARRAY(sa.BigInteger))
    row = _unnest("row", import_id=_IMPORT_IDS, event_id=event_ids, stream_sequence=sequences)
    rows = sa.select(_TARGET, row.c.import_id, row.c.event_id, row.c.stream_sequence)
    insert = pg.insert(import_events).from_select(["target", "import_id", "event_id", "stream_sequence"], rows)
    fields = {"event_id": insert.excluded.event_id, "stream_sequence": insert.excluded.stream_sequence, "handled_at": sa.func.now()}
    return insert.on_conflict_do_update(index_elements=["target", "import_id"], set_=fields)


def _remember_waiting_statement() -> pg.Insert:
    """重投的只记一次；又发布了一回的（死信放回来的）从头等起。"""
    row = _unnest(
        "row",
        import_id=_IMPORT_IDS,
        event_id=sa.bindparam("event_ids", type_=sa.ARRAY(sa.Uuid)),
        allow_deletes=sa.bindparam("allow_deletes", type_=sa.ARRAY(sa.Boolean)),
        stream_sequence=sa.bindparam("sequences", type_=sa.ARRAY(sa.BigInteger)),
        stored_at=sa.bindparam("stored_ats", type_=sa.ARRAY(TIMESTAMP)),
    )
    columns = ["import_id", "event_id", "allow_deletes", "stream_sequence", "stored_at"]
    rows = sa.select(_TARGET, *(row.c[name] for name in columns))
    insert = pg.insert(waiting_events).from_select(["target", *columns], rows)
    again = {name: insert.excluded[name] for name in columns[2:]} | {"looks": 0, "look_at": sa.func.now()}
    return insert.on_conflict_do_update(
        index_elements=["target", "import_id", "event_id"], set_=again, where=waiting_events.c.stored_at < insert.excluded.stored_at
    )


_REMEMBER_REQUESTS, _REMEMBER_EVENTS = _remember_requests_statement(), _remember_events_statement()
_REMEMBER_WAITING = _remember_waiting_statement()
