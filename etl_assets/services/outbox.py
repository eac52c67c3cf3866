"""发件箱：完成事件与数据在同一事务里写下，由桥发布；崩溃丢不了事件。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import installation, outbox

EVENT_VERSION = "1.0"
Status = Literal["success", "partial_success", "failed"]


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

    def payload(self, event_id: UUID) -> dict[str, Any]:
        """事件的 JSON 对象，installation 与 target 除外。"""
        event: dict[str, Any] = {
            "event_id": str(event_id),
            "event_version": EVENT_VERSION,
            "occurred_at": datetime.now(UTC).isoformat(),
            "status": self.status,
            "partitions": [day.isoformat() for day in self.days],
            "run_id": self.run_id,
            "import_ids": [str(import_id) for import_id in self.import_ids],
            "success_count": self.success_count,
            "error_count": self.error_count,
            "duration_seconds": round(self.duration_seconds, 3),
            "downstream": self.downstream,
        }
        return event | ({"error": self.error} if self.error else {})


def add_completion(connection: sa.Connection, target: str, completion: Completion) -> None:
    """写进发件箱；`installation` 让监听器认出自己发的事件，不至于又去要求下游。

    `target` 是写的哪个 schema：影子与正式的结果在同一个流里宣布，听的人要分得出来。
    """
    event_id = uuid4()
    payload = completion.payload(event_id) | {"target": target}
    connection.execute(_ADD, {"event_id": event_id, "asset": completion.asset, "given": payload})


_ADD = sa.insert(outbox).values(
    event_id=sa.bindparam("event_id"),
    asset=sa.bindparam("asset"),
    payload=sa.bindparam("given", type_=pg.JSONB).concat(
        sa.func.jsonb_build_object("installation", sa.cast(sa.select(installation.c.installation_id).scalar_subquery(), sa.Text))
    ),
)


def installation_id(connection: sa.Connection) -> UUID:
    """这套安装的身份，由 init-db 写下。"""
    identity: UUID = connection.execute(sa.select(installation.c.installation_id)).scalar_one()
    return identity


def read_unpublished(connection: sa.Connection, *, limit: int) -> Sequence[sa.Row[Any]]:
    """最早的未发布事件：outbox_id、event_id、asset、payload。两个发布者都读到也无妨，NATS 按 event_id 去重。"""
    oldest = sa.select(outbox.c.outbox_id, outbox.c.event_id, outbox.c.asset, outbox.c.payload)
    return connection.execute(oldest.order_by(outbox.c.outbox_id).limit(limit)).all()


def delete_published(connection: sa.Connection, outbox_ids: Sequence[int]) -> None:
    """NATS 已存下的事件从发件箱删去。"""
    connection.execute(sa.delete(outbox).where(outbox.c.outbox_id.in_(outbox_ids)))
