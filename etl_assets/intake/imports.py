"""导入事件进台账：哪些天受一次导入影响，一条查询答完一批；没有分区可去的坏行也在这里记下。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import psycopg.errors
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core import metrics
from etl_assets.core.arrays import array, given_rows, in_arrays, insert_given
from etl_assets.core.business_day import DayRange, local_day, partition_range
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.etl_tables import TARGET, import_events, import_requests, rejected_rows, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, target_tables
from etl_assets.intake.named_orders import MANY_DAYS, named_orders, note_scattered_orders, versions_of
from etl_assets.ledger.locks import lock_days, lock_imports
from etl_assets.ledger.requests import request_days
from etl_assets.services import raw_rows
from etl_assets.services.day_accounts import forget_accounts_with
from etl_assets.services.shops import shops_of

# 这时握着导入的锁，别的事件等着：占不住就当作都在，多要求一次无妨
_PATIENCE = "20ms"
NO_SEQUENCE = 0
"""不是流里的事件：没有人宣布的导入要求不了，像事件那样等着。流的序号从 1 起。"""

Outcome = Literal["requested", "known", "irrelevant", "asks for nothing", "pending", "missing"]
"""requested：已要求受影响的日子；known：同一事件先前已处理；irrelevant：撤回的导入从未入表；
asks for nothing：事件不要求什么；pending、missing：导入还没完成、还没有。"""


@dataclass(frozen=True)
class ImportEvent:
    """说一次导入完成或撤回的事件；范围以 import_tasks 的行为准。sequence 是它在流里的序号，stored_at 是流存下它的时刻。

    asks：说的是别的事的（还在导入）什么也不要求。
    """

    import_id: UUID
    event_id: UUID
    asks: bool = True
    allow_deletes: bool = False
    sequence: int | None = None
    stored_at: datetime | None = None


@translated_errors()
def request_imports(engine: sa.Engine, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """在一个事务里处理一批事件，逐个给出结果；导入还没完成的记下来，提交之后就可以确认。"""
    with engine.begin() as connection:
        outcomes = take_in(connection, settings, events)
        remember_waiting(
            connection,
            settings.target_schema,
            [event for event, outcome in zip(events, outcomes, strict=True) if outcome in ("pending", "missing")],
        )
    metrics.imports_taken_in("announced", outcomes.count("requested"))
    return outcomes


def take_in(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """锁住这些导入，决定每个事件该怎么办，要求受影响的日子。"""
    target = settings.target_schema
    lock_imports(connection, target, (event.import_id for event in events if event.asks))
    outcomes = decide_outcomes(connection, settings, events)
    decided = list(zip(events, outcomes, strict=True))
    if requested := [event for event, outcome in decided if outcome == "requested"]:
        request_affected_days(connection, settings, requested)
    # 没有人宣布的也记下：不然每看一回都又找到它
    if seen := [event for event, outcome in decided if outcome == "irrelevant" and event.sequence == NO_SEQUENCE]:
        _remember_events(connection, target, seen)
    return outcomes


def decide_outcomes(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> list[Outcome]:
    """每个事件该怎么办；导入的锁由调用者先拿好。"""
    import_ids = sorted({event.import_id for event in events})
    known = connection.execute(_KNOWN_IMPORTS, {"of_target": settings.target_schema, "import_ids": import_ids}).all()
    statuses = {row.import_id: row.status for row in known if row.status is not None}
    handled = {row.import_id: row for row in known if row.event_id is not None}
    withdrawn = [import_id for import_id in import_ids if statuses.get(import_id) == "failed"]
    # 先前要求过的导入可能有运行还要写它，那时表里看不到它
    traced = handled.keys() | _traced(
        connection, settings, [import_id for import_id in withdrawn if import_id not in handled]
    )

    def is_known(event: ImportEvent) -> bool:
        """这个事件，或者没有人宣布的后来有人宣布了；此后状态变了的不算，那一个事件也许丢了。"""
        row = handled.get(event.import_id)
        if row is None or row.import_status not in (None, row.status):
            return False
        return event.sequence == NO_SEQUENCE or row.event_id == event.event_id

    def decide(event: ImportEvent) -> Outcome:
        if not event.asks:
            return "asks for nothing"
        match statuses.get(event.import_id):
            case None:
                return "missing"
            case "completed" | "failed" if is_known(event):
                return "known"
            case "completed":
                return "requested"
            case "failed":
                return "requested" if event.import_id in traced else "irrelevant"
            case _:
                return "pending"

    return [decide(event) for event in events]


def has_traces(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> bool:
    """撤回的导入在表里还有行、拒收记录，或者可能有运行正写着它。"""
    return bool(_traced(connection, settings, [import_id]))


def _traced(connection: sa.Connection, settings: EtlSettings, withdrawn: Sequence[UUID]) -> set[UUID]:
    """撤回的导入里，表里有痕迹或者可能有运行正写着的。"""
    found = _in_tables(connection, settings, withdrawn) if withdrawn else set()
    unseen = [import_id for import_id in withdrawn if import_id not in found]
    return found | _in_tables_or_in_a_run(connection, settings, unseen) if unseen else found


def _in_tables(connection: sa.Connection, settings: EtlSettings, import_ids: Sequence[UUID]) -> set[UUID]:
    """有行在 orders 里、或有拒收记录的导入：没有事件也可能做过（有人重算了那些天）。"""
    rejected = sa.and_(
        rejected_rows.c.target == settings.target_schema, rejected_rows.c.import_id == sa.any_(_IMPORT_IDS)
    )
    in_tables = _loaded_imports(settings.target_schema).union(sa.select(rejected_rows.c.import_id).where(rejected))
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
        # 锁不到是一个错误，不在保存点里，整批的事务就废了；退回去也退了缩短的 lock_timeout，成功时要自己改回来
        with connection.begin_nested():
            connection.execute(sa.select(sa.func.set_config("lock_timeout", _PATIENCE, sa.true())))
            lock_days(connection, settings.target_schema, wanted)
            connection.execute(sa.select(sa.func.set_config("lock_timeout", patience, sa.true())))
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            return set(import_ids)
        raise
    forget_accounts_with(connection, settings.target_schema, import_ids, wanted)
    return _in_tables(connection, settings, import_ids)


def request_affected_days(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent]) -> set[date]:
    """要求这些导入影响的日子，记下是哪个事件要求的；返回那些日子。"""
    target = settings.target_schema
    import_ids = sorted({event.import_id for event in events})
    raw_rows.reject_rows_without_partition(connection, settings, import_ids)
    days_of_imports = read_affected_days(connection, settings, import_ids)
    affected = [(row.import_id, row.day) for row in days_of_imports]
    deleting = {event.import_id for event in events if event.allow_deletes}
    deletes_allowed_on = {day for import_id, day in affected if import_id in deleting}
    revisions = request_days(
        connection, target, {day for _, day in affected}, changed_only=True, deletes_allowed_on=deletes_allowed_on
    )
    _remember_requests(connection, target, affected, revisions)
    _remember_events(connection, target, events)
    elsewhere = Counter(row.import_id for row in days_of_imports if not row.is_own)
    for import_id, days in elsewhere.most_common(1):
        if days > MANY_DAYS:
            note_scattered_orders(connection, settings, import_id)
    return {day for _, day in affected}


def read_affected_days(
    connection: sa.Connection, settings: EtlSettings, import_ids: Sequence[UUID]
) -> Sequence[sa.Row[tuple[UUID, date, bool]]]:
    """每个导入影响的业务日：它点名的订单在任何完成的导入里的全部版本，加上它自己的行（坏行也要上账，is_own）。

    只看存在的分区；撤回的导入自己的版本也算。
    """
    statement = _affected_days(settings.timezone, partition_range(settings), several=len(import_ids) > 1)
    return connection.execute(statement, {"import_ids": list(import_ids)}).all()


def _remember_requests(
    connection: sa.Connection, target: str, affected: Sequence[tuple[UUID, date]], revisions: Mapping[date, int]
) -> None:
    """记下每个导入在哪一天要求了哪个版本：`etl wait` 与完成事件的 import_ids 由此而来。"""
    rows = [(import_id, day, revisions[day]) for import_id, day in affected]
    execute_compiled(
        connection, _REMEMBER_REQUESTS, {"of_target": target, **in_arrays(import_requests, _REQUESTED, rows)}
    )


def _remember_events(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> None:
    """记下每个导入最新的事件，整批一条语句。"""
    newest = {event.import_id: (event.import_id, event.event_id, event.sequence, event.stored_at) for event in events}
    rows = [newest[import_id] for import_id in sorted(newest)]
    execute_compiled(connection, _REMEMBER_EVENTS, {"of_target": target, **in_arrays(import_events, _HANDLED, rows)})


def remember_waiting(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> None:
    """记下要等导入的事件；不是从流里来的没有期限可言，不记。"""
    newest = {
        (event.import_id, event.event_id): (
            event.import_id,
            event.event_id,
            event.allow_deletes,
            event.sequence,
            event.stored_at,
        )
        for event in events
        if event.sequence is not None and event.stored_at is not None
    }
    if newest:
        rows = list(newest.values())
        execute_compiled(
            connection, _REMEMBER_WAITING, {"of_target": target, **in_arrays(waiting_events, _WAITING, rows)}
        )


# ---- 每批事件都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------

_IMPORT_IDS = array("import_ids", sa.Uuid)
_KNOWN_IMPORTS = sa.text("""
    SELECT wanted.import_id, t.status, e.event_id, e.import_status FROM unnest(:import_ids) AS wanted (import_id)
    LEFT JOIN public.import_tasks t ON t.import_id = wanted.import_id
    LEFT JOIN etl.import_events e ON e.import_id = wanted.import_id AND e.target = :of_target""").bindparams(
    _IMPORT_IDS
)


@lru_cache(maxsize=8)
def _loaded_imports(schema: str) -> sa.Select[tuple[UUID]]:
    """这些导入里有行在 orders 里的。orders 的 import_id 没有索引：由它自己的行点名的订单去找，在每个店里各找一次，店铺改了名也找得到。"""
    orders = target_tables(schema).orders
    order_id = sa.select(raw_orders.c.import_id, order_id_key(raw_orders.c.order_id).label("order_id"))
    named = order_id.where(raw_orders.c.import_id == sa.any_(_IMPORT_IDS)).distinct().subquery("named")
    shops = shops_of(orders)
    of_order = sa.and_(orders.c.shop_id == shops.c.shop_id, orders.c.order_id == named.c.order_id)
    loaded = sa.and_(of_order, orders.c.import_id == named.c.import_id)
    return sa.select(named.c.import_id).join_from(named, shops, sa.true()).join(orders, loaded)


@lru_cache(maxsize=16)
def _affected_days(timezone: str, partitions: DayRange, *, several: bool) -> sa.Select[tuple[UUID, date, bool]]:
    """一行一个导入的一天；is_own：它自己在这一天有行。

    :param several: 不止一个导入。同一个订单的版本只读一回，有几个导入点到它都一样：占位的号（`-`、`合计`）每个文件里都有。
    """
    named = named_orders(_IMPORT_IDS)
    if several:
        orders = sa.select(named.c.order_id, named.c.shop).distinct().subquery("pairs")
        of_orders = (
            _days_of_versions(orders, timezone, orders.c.order_id, orders.c.shop)
            .distinct()
            .offset(0)
            .subquery("of_orders")
        )
        same_order = sa.and_(of_orders.c.order_id == named.c.order_id, of_orders.c.shop == named.c.shop)
        of_versions = sa.select(named.c.import_id, of_orders.c.day, sa.false().label("is_own")).join(
            of_orders, same_order
        )
    else:
        of_versions = _days_of_versions(named, timezone, named.c.import_id).add_columns(sa.false().label("is_own"))
    own = sa.select(raw_orders.c.import_id, local_day(raw_orders.c.ordered_at, timezone), sa.true()).where(
        raw_orders.c.import_id == sa.any_(_IMPORT_IDS)
    )
    days = of_versions.union(own).subquery("days").c
    found = sa.select(days.import_id, days.day, sa.func.bool_or(days.is_own).label("is_own"))
    return found.where(partitions.includes(days.day)).group_by(days.import_id, days.day)


def _days_of_versions(orders: sa.FromClause, timezone: str, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """这些订单的版本，一行一个完成了的导入里的一个：columns 与它的 day。"""
    versions = versions_of(orders, *columns)
    return (
        sa.select(
            *versions.c[*[column.name for column in columns]], local_day(versions.c.ordered_at, timezone).label("day")
        )
        .join(import_tasks, import_tasks.c.import_id == versions.c.version_import_id)
        .where(raw_rows.IN_SCOPE)
    )


_REQUESTED = ("import_id", "day", "revision")
_request = insert_given(import_requests, _REQUESTED)
_REMEMBER_REQUESTS = _request.on_conflict_do_update(
    index_elements=["target", "import_id", "day"], set_={"revision": _request.excluded.revision}
)

_HANDLED = ("import_id", "event_id", "stream_sequence", "stored_at")
_given_events = given_rows(import_events, _HANDLED)
_event = pg.insert(import_events).from_select(
    ["target", *_HANDLED, "import_status"],
    # 就在这里读，不多一次往返。其间变了的也对：做那些日子的运行更晚才读
    sa.select(TARGET, *_given_events.c, import_tasks.c.status).select_from(
        _given_events.outerjoin(import_tasks, import_tasks.c.import_id == _given_events.c.import_id)
    ),
)
_REMEMBER_EVENTS = _event.on_conflict_do_update(
    index_elements=["target", "import_id"],
    set_={
        "event_id": _event.excluded.event_id,
        "stream_sequence": sa.func.greatest(
            import_events.c.stream_sequence, _event.excluded.stream_sequence
        ),  # 重投的旧事件不往回拨
        "handled_at": sa.func.now(),
        "stored_at": _event.excluded.stored_at,
        "import_status": _event.excluded.import_status,
    },
)

_WAITING = ("import_id", "event_id", "allow_deletes", "stream_sequence", "stored_at")
_waiting = insert_given(waiting_events, _WAITING)
# 重投的只记一次；又发布了一回的（死信放回来的）从头等起
_REMEMBER_WAITING = _waiting.on_conflict_do_update(
    index_elements=["target", "import_id", "event_id"],
    set_={**{name: _waiting.excluded[name] for name in _WAITING[2:]}, "looks": 0, "look_at": sa.func.now()},
    where=waiting_events.c.stored_at < _waiting.excluded.stored_at,
)
