"""台账与数据对得上吗：从备份恢复之后、事件没有发出来时，会对不上。只读；给 `etl doctor`。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.business_day import local_day, partition_range
from etl_assets.core.etl_tables import import_events, ledger, rejected_rows, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs, target_tables, trimmed
from etl_assets.ledger.graph import roots_of
from etl_assets.services.raw_rows import IN_SCOPE
from etl_assets.services.rollout import read_share

_ON_THE_WAY = timedelta(minutes=1)
"""刚完成的导入，事件可能正在路上，或者监听器正等着宽限过去。"""


@dataclass(frozen=True)
class Disagreement:
    """原始数据里有、台账或表里没有的：行数与它们的日子（first 到 last 之间）。"""

    rows: int
    first: date
    last: date


def unannounced_imports(connection: sa.Connection, settings: EtlSettings) -> Sequence[str]:
    """完成了而台账从没听说过的导入，旧的在前；监听器过了宽限会自己要进来的不算。"""
    heard = [
        sa.exists().where(known.c.import_id == import_tasks.c.import_id, known.c.target == settings.target_schema)
        for known in (import_events, waiting_events)
    ]
    silent = sa.select(import_tasks.c.import_id).where(IN_SCOPE, _is_settled(settings), ~sa.or_(*heard))
    return [str(import_id) for import_id in connection.scalars(silent.order_by(import_tasks.c.completed_at, import_tasks.c.import_id))]


def unasked_days(connection: sa.Connection, settings: EtlSettings) -> Disagreement | None:
    """有原始行、台账却从没被要求过的日子：台账比数据旧。"""
    rows = _raw_rows(settings)
    asked = sa.select(ledger.c.day).where(*_of_orders(settings), ledger.c.day == rows.c.day, ledger.c.requested > 0)
    return _summary(connection, sa.select(rows.c.day).where(~asked.exists()))


def rows_nowhere(connection: sa.Connection, settings: EtlSettings) -> Disagreement | None:
    """台账说做完了，而原始行既不在 orders（它的订单也没有别的版本在）、也没有被拒收：表比台账旧。只认领一部分数据时不看。"""
    if not read_share(connection, settings).is_whole:
        return None
    rows = _raw_rows(settings)
    orders = target_tables(settings.target_schema).orders
    there = (
        sa.select(orders.c.order_id)
        .join(shop_configs, shop_configs.c.shop_id == orders.c.shop_id)
        .where(shop_configs.c.shop_name == rows.c.shop, orders.c.order_id == rows.c.order_id)
    )
    refused = sa.select(rejected_rows.c.raw_id).where(
        rejected_rows.c.raw_id == rows.c.raw_id, rejected_rows.c.target == settings.target_schema
    )
    done = sa.select(ledger.c.day).where(
        *_of_orders(settings), ledger.c.day == rows.c.day, ledger.c.requested > 0, ledger.c.requested <= ledger.c.materialized
    )
    return _summary(connection, sa.select(rows.c.day).where(done.exists(), ~there.exists(), ~refused.exists()))


def newest_handled_sequence(connection: sa.Connection, settings: EtlSettings) -> int:
    """台账听说过的最新的事件在流里的序号；没有就是 0。"""
    newest = sa.select(sa.func.max(import_events.c.stream_sequence)).where(import_events.c.target == settings.target_schema)
    return connection.scalar(newest) or 0


def lacks_event(connection: sa.Connection, settings: EtlSettings, *, import_id: UUID, event_id: UUID, sequence: int) -> bool:
    """这个已处理的导入事件，台账该知道却不知道。没有这次导入的（进了死信）、从未入表就撤回的，台账本来不记。"""
    remembered = sa.and_(import_events.c.import_id == import_tasks.c.import_id, import_events.c.target == settings.target_schema)
    row = connection.execute(
        sa.select(import_tasks.c.status, import_events.c.event_id, import_events.c.stream_sequence)
        .outerjoin(import_events, remembered)
        .where(import_tasks.c.import_id == import_id)
    ).first()
    if row is None or row.event_id is None:
        waits = sa.exists().where(
            waiting_events.c.target == settings.target_schema,
            waiting_events.c.import_id == import_id,
            waiting_events.c.event_id == event_id,
        )
        return row is not None and row.status == "completed" and not connection.scalar(sa.select(waits))
    return row.event_id != event_id and (row.stream_sequence or 0) < sequence


def _raw_rows(settings: EtlSettings) -> sa.Subquery:
    """范围之内、分区之内的原始行：raw_id、shop、order_id、day。"""
    day = local_day(raw_orders.c.ordered_at, settings.timezone).label("day")
    rows = (
        sa.select(raw_orders.c.raw_id, trimmed(raw_orders.c.shop).label("shop"), trimmed(raw_orders.c.order_id).label("order_id"), day)
        .join(import_tasks, import_tasks.c.import_id == raw_orders.c.import_id)
        .where(IN_SCOPE, _is_settled(settings))
        .subquery("dated")
    )
    return sa.select(rows).where(partition_range(settings).includes(rows.c.day)).subquery("raw_rows")


def _of_orders(settings: EtlSettings) -> tuple[sa.ColumnElement[bool], ...]:
    return ledger.c.target == settings.target_schema, ledger.c.asset.in_(roots_of(settings.target_schema))


def _is_settled(settings: EtlSettings) -> sa.ColumnElement[bool]:
    on_the_way = _ON_THE_WAY + timedelta(seconds=settings.unannounced_after_seconds)
    return sa.func.coalesce(import_tasks.c.completed_at < sa.func.now() - on_the_way, sa.true())


def _summary(connection: sa.Connection, days: sa.Select[tuple[date]]) -> Disagreement | None:
    found = days.subquery("found")
    count, first, last = connection.execute(sa.select(sa.func.count(), sa.func.min(found.c.day), sa.func.max(found.c.day))).one()
    return Disagreement(rows=count, first=first, last=last) if count else None
