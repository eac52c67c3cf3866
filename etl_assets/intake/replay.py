"""重放：流里的事件再问一遍台账。做完了的不再要求；台账比流旧（从备份恢复）时，缺的由此补上。"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

import sqlalchemy as sa

from etl_assets.core.arrays import array
from etl_assets.core.settings import EtlSettings
from etl_assets.intake.imports import ImportEvent, Outcome, decide_outcomes, request_affected_days
from etl_assets.ledger.locks import lock_imports
from etl_assets.ledger.requests import request_downstream


@dataclass(frozen=True)
class ReplayedImports:
    """每个事件的结果，与因此要求的日子；done 是台账说它已经做完了。"""

    outcomes: Sequence[Outcome | Literal["done"]]
    days: Collection[date]


def replay_imports(
    connection: sa.Connection, settings: EtlSettings, events: Sequence[ImportEvent], *, force: bool
) -> ReplayedImports:
    """没做完的导入再要求一遍，同一个事件先前处理过也一样；force 时做完了的也要求。"""
    target = settings.target_schema
    lock_imports(connection, target, (event.import_id for event in events))
    done = set() if force else _done_events(connection, target, events)
    left = [event for event in events if event not in done]
    decided = iter(decide_outcomes(connection, settings, left) if left else [])
    outcomes: list[Outcome | Literal["done"]] = ["done" if event in done else next(decided) for event in events]
    outcomes = ["requested" if outcome == "known" else outcome for outcome in outcomes]
    requested = [event for event, outcome in zip(events, outcomes, strict=True) if outcome == "requested"]
    return ReplayedImports(outcomes, request_affected_days(connection, settings, requested) if requested else set())


def _done_events(connection: sa.Connection, target: str, events: Sequence[ImportEvent]) -> set[ImportEvent]:
    """台账处理过这个事件或同一导入更晚的一个，而且要求的日子全程做完了。

    更晚要序号与时刻都更晚：流重建之后序号会重来，两台机器的时钟会有出入。
    """
    import_ids = list({event.import_id for event in events})
    handled = {
        row.import_id: row for row in connection.execute(_NEWEST_DONE, {"of_target": target, "import_ids": import_ids})
    }

    def is_covered(event: ImportEvent) -> bool:
        row = handled.get(event.import_id)
        if row is None:
            return False
        is_behind = (row.stream_sequence or 0) >= (event.sequence or 0)
        is_older = event.stored_at is not None and row.handled_at >= event.stored_at
        return row.event_id == event.event_id or (is_behind and is_older)

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
    rows = connection.execute(_FOLLOWING, {"of_target": target, "of_asset": asset, "days": list(days)})
    return {
        row.day for row in rows if not row.is_due and row.requested_at is not None and row.requested_at >= days[row.day]
    }


# 要求的日子全程做完了的导入，它们最新的事件
_NEWEST_DONE = sa.text("""
    SELECT e.import_id, e.event_id, e.stream_sequence, e.handled_at FROM etl.import_events e
    WHERE e.target = :of_target AND e.import_id = ANY (:import_ids) AND NOT EXISTS (
        SELECT FROM etl.import_requests r JOIN etl.assets a ON a.target = e.target
        LEFT JOIN etl.ledger l ON l.target = e.target AND l.asset = a.asset AND l.day = r.day
        WHERE r.target = e.target AND r.import_id = e.import_id AND coalesce(l.materialized, -1) < r.revision
    )""").bindparams(array("import_ids", sa.Uuid))

# of_asset 后面的资产，一行一天：紧跟着它的最早何时要求的，有没有到期的
_FOLLOWING = sa.text("""
    SELECT l.day, min(l.requested_at) FILTER (WHERE :of_asset = ANY (a.upstreams)) AS requested_at,
           bool_or(l.requested > l.materialized) AS is_due
    FROM etl.ledger l JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
    WHERE :of_asset = ANY (a.ancestors) AND l.target = :of_target AND l.day = ANY (:days)
    GROUP BY l.day""").bindparams(array("days", sa.Date))
