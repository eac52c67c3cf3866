"""发件箱：完成事件与数据在同一事务里写下，由桥发布；崩溃丢不了事件。

一次做完的导入与日子没有上限，一个事件的长度有：多了分成几份，每份是一个事件。
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.asset_events import EVENT_VERSION
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import installation, outbox
from etl_assets.core.text import storable

PART_SIZE = 1_000
"""一份里至多这么多导入、这么多天：加上最长的 error 也不到 64 KiB，ETL_EVENT_MAX_BYTES 最小是它。"""
LONGEST_ERROR = 2_000
SET_ASIDE_SECONDS = 600
Status = Literal["success", "partial_success", "failed"]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """一个资产的一段日子做完了，或失败了；字段见 DOMAIN 第 7 节。"""

    asset: str
    days: DayRange
    run_id: str
    status: Status
    downstream: Literal["included", "pending"]
    import_ids: Sequence[UUID] = ()
    success_count: int = 0
    error_count: int = 0
    duration_seconds: float = 0.0
    error: str | None = None

    def payloads(self) -> list[dict[str, Any]]:
        """一份一个 JSON 对象，installation 与 target 除外。每份的日子与导入自成一对，数字是整个运行的。"""
        pairs = [(days, import_ids) for days in _slices(list(self.days)) for import_ids in _slices(self.import_ids)]
        event: dict[str, Any] = {
            "event_version": EVENT_VERSION,
            "occurred_at": datetime.now(UTC).isoformat(),
            "status": self.status,
            "run_id": self.run_id,
            "success_count": self.success_count,
            "error_count": self.error_count,
            "duration_seconds": round(self.duration_seconds, 3),
            "downstream": self.downstream,
            # 错误的消息里什么字都有，而 jsonb 不收 NUL：不能因为一个字，失败也宣布不出去
            **({"error": storable(self.error[:LONGEST_ERROR])} if self.error else {}),
        }
        return [
            event
            | {
                "event_id": str(uuid4()),
                "partitions": [day.isoformat() for day in days],
                "import_ids": [str(one) for one in import_ids],
            }
            | ({"part": part, "parts": len(pairs)} if len(pairs) > 1 else {})
            for part, (days, import_ids) in enumerate(pairs, start=1)
        ]


def _slices(items: Sequence[Item]) -> list[Sequence[Item]]:
    """每段至多 PART_SIZE 个；没有的也是一段。"""
    return [items[first : first + PART_SIZE] for first in range(0, max(len(items), 1), PART_SIZE)]


def add_completion(connection: sa.Connection, target: str, completion: Completion) -> None:
    """写进发件箱；`installation` 让监听器认出自己发的事件，不至于又去要求下游。

    `target` 是写的哪个 schema：影子与正式的结果在同一个流里宣布，听的人要分得出来。
    """
    connection.execute(_ADD, [_row(target, completion, payload) for payload in completion.payloads()])


def announcement(target: str, completion: Completion) -> dict[str, Any]:
    """`announcing` 的参数：完成事件，它的导入由那条语句填上。"""
    # 日子就不止一份的，那条语句怎样也装不下：-1 叫它一份也不写，由 complete 分开写
    payload, *more = completion.payloads()
    return {**_row(target, completion, payload), "most_imports": -1 if more else PART_SIZE}


def announcing(finished: sa.CTE) -> sa.CTE:
    """把 `finished` 的导入填进完成事件，写进发件箱。一份装不下的不写：由 `add_completion` 分成几份。"""
    import_id = sa.cast(finished.c.import_id, sa.Text)
    listed = sa.func.jsonb_agg(pg.aggregate_order_by(import_id, import_id), type_=pg.JSONB)
    import_ids = sa.select(sa.func.coalesce(listed, sa.cast("[]", pg.JSONB))).scalar_subquery()
    is_one_part = sa.select(sa.func.count()).select_from(finished).scalar_subquery() <= sa.bindparam(
        "most_imports", type_=sa.BigInteger
    )
    row = sa.select(
        sa.bindparam("event_id", type_=outbox.c.event_id.type),
        sa.bindparam("asset", type_=sa.Text),
        _PAYLOAD.concat(sa.func.jsonb_build_object("import_ids", import_ids)),
    )
    return sa.insert(outbox).from_select(["event_id", "asset", "payload"], row.where(is_one_part)).cte("announced")


def _row(target: str, completion: Completion, payload: Mapping[str, Any]) -> dict[str, object]:
    given = json.dumps({**payload, "target": target}, ensure_ascii=False)
    return {"event_id": UUID(payload["event_id"]), "asset": completion.asset, "given": given}


_PAYLOAD = sa.cast(sa.bindparam("given", type_=sa.Text), pg.JSONB).concat(
    sa.func.jsonb_build_object(
        "installation", sa.cast(sa.select(installation.c.installation_id).scalar_subquery(), sa.Text)
    )
)
_ADD = sa.insert(outbox).values(event_id=sa.bindparam("event_id"), asset=sa.bindparam("asset"), payload=_PAYLOAD)


def installation_id(connection: sa.Connection) -> UUID:
    """这套安装的身份，由 init-db 写下。"""
    identity: UUID = connection.execute(sa.select(installation.c.installation_id)).scalar_one()
    return identity


def read_unpublished(connection: sa.Connection, *, limit: int) -> Sequence[sa.Row[Any]]:
    """最早的未发布事件：outbox_id、event_id、asset、payload；放在一边的到时候再来。

    两个发布者都读到也无妨，NATS 按 event_id 去重。
    """
    oldest = sa.select(outbox.c.outbox_id, outbox.c.event_id, outbox.c.asset, outbox.c.payload)
    due = sa.or_(outbox.c.retry_at.is_(None), outbox.c.retry_at <= sa.func.now())
    return connection.execute(oldest.where(due).order_by(outbox.c.outbox_id).limit(limit)).all()


def delete_published(connection: sa.Connection, outbox_ids: Sequence[int]) -> None:
    """NATS 已存下的事件从发件箱删去。"""
    connection.execute(sa.delete(outbox).where(outbox.c.outbox_id.in_(outbox_ids)))


def set_aside(connection: sa.Connection, problems: Mapping[int, str]) -> None:
    """发不了的放在一边，不挡后面的；过一会儿再试。problems 是 outbox_id 到原因。"""
    later = sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, SET_ASIDE_SECONDS)
    of_row = sa.update(outbox).where(outbox.c.outbox_id == sa.bindparam("of_id"))
    rows = [{"of_id": outbox_id, "found": problem} for outbox_id, problem in problems.items()]
    connection.execute(of_row.values(problem=sa.bindparam("found"), retry_at=later), rows)
