"""重放：流里的事件再问一遍台账。做完了的不再要求；台账比流旧（从备份恢复）时，缺的由此补上。"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

import sqlalchemy as sa

from etl_assets.core.etl_tables import assets, import_events, import_requests, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, Outcome, decide_outcomes, request_affected_days
from etl_assets.ledger.graph import IN_GRAPH
from etl_assets.ledger.locks import lock_imports
from etl_assets.ledger.requests import request_downstream


@dataclass(frozen=True)
class ReplayedImports:
    """每个事件的结果，与因此要求的日子；done 是台账说它已经做完了。"""

    outcomes: Sequence[Outcome | Literal["done"]]
    days: Collection[date]


def replay_imports(connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent], *, force: bool) -> ReplayedImports:
    """没做完的导入再要求一遍，同一个事件先前处理过也一样；force 时做完了的也要求。"""
    target = settings.target_schema
    lock_imports(connection, target, (event.import_id for event in events))
    done = set() if force else _done_events(connection, target, events)
    left = [event for event in events if event not in done]
    decided = iter(decide_outcomes(connection, settings, left) if left else [])
    outcomes: list[Outcome | Literal["done"]] = ["done" if event in done else _asked_again(next(decided)) for event in events]
    requested = [event for event, outcome in zip(events, outcomes, strict=True) if outcome == "requested"]
    return ReplayedImports(outcomes, request_affected_days(connection, settings, requested) if requested else set())


def _asked_again(outcome: Outcome) -> Outcome:
    return "requested" if outcome == "known" else outcome


def _done_events(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> set[ImportEvent]:
    """台账处理过这个事件或同一导入更晚的一个，而且要求的日子全程做完了。

    更晚要序号与时刻都更晚：流重建之后序号会重来，两台机器的时钟会有出入。
    """
    of_day = sa.and_(ledger.c.target == target, ledger.c.asset == assets.c.asset, ledger.c.day == import_requests.c.day)
    unfinished = (
        sa.select(import_requests.c.day)
        .select_from(import_requests)
        .join(assets, assets.c.target == target)
        .outerjoin(ledger, of_day)
        .where(
            import_requests.c.target == target,
            import_requests.c.import_id == import_events.c.import_id,
            sa.func.coalesce(ledger.c.materialized, -1) < import_requests.c.revision,
        )
        .exists()
    )
    import_ids = sa.cast(list({event.import_id for event in events}), sa.ARRAY(sa.Uuid))
    newest = sa.select(import_events).where(import_events.c.target == target, import_events.c.import_id == sa.any_(import_ids), ~unfinished)
    handled = {row.import_id: row for row in connection.execute(newest)}

    def is_covered(event: ImportEvent) -> bool:
        row = handled.get(event.import_id)
        if row is None:
            return False
        later = (row.stream_sequence or 0) >= (event.sequence or 0) and event.stored_at is not None and row.handled_at >= event.stored_at
        return bool(row.event_id == event.event_id or later)

    return {event for event in events if event.asks and is_covered(event)}


def replay_completion(
    connection: sa.Connection, target: str, asset: str, days: Mapping[date, datetime], *, force: bool
) -> Collection[date]:
    """别处的 ETL 做完了 asset 的这些天（→ 流存下那个事件的时刻）：还没有接着做的，让下游到期；返回那些日子。"""
    asked = set(days) if force else set(days) - _done_days(connection, target, asset, days)
    request_downstream(connection, target, asset, asked)
    return asked


def _done_days(connection: sa.Connection, target: str, asset: str, days: Mapping[date, datetime]) -> set[date]:
    """紧跟在后面的都在那个时刻之后被要求过，而且再往后也都做完了：做它们的运行读得到别处写的。"""
    made = sa.literal(asset)
    rows = connection.execute(
        sa.select(
            ledger.c.day,
            sa.func.min(ledger.c.requested_at).filter(made == sa.any_(assets.c.upstreams)).label("requested_at"),
            sa.func.bool_or(ledger.c.requested > ledger.c.materialized).label("is_due"),
        )
        .join(assets, IN_GRAPH)
        .where(
            made == sa.any_(assets.c.ancestors), ledger.c.target == target, ledger.c.day == sa.any_(sa.cast(list(days), sa.ARRAY(sa.Date)))
        )
        .group_by(ledger.c.day)
    )
    return {row.day for row in rows if not row.is_due and row.requested_at is not None and row.requested_at >= days[row.day]}
