"""事件的信封：DOMAIN 第 7 节的字段；多出来的字段原样保留。"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Literal
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from bridge.events.subjects import DATA_IMPORT_COMPLETED, completed_asset

EVENT_VERSION = "1.0"
ENVELOPE_FIELDS = ("event_id", "event_version", "occurred_at", "status")
"""收到的事件必须带的字段；自己造事件时由默认值补上。"""

IMPORT_STATUSES = ("completed", "failed")
"""只有这些状态的导入事件要求什么。"""


class Event(BaseModel):
    """每个事件都有的字段。"""

    model_config = ConfigDict(extra="allow", frozen=True)

    event_id: UUID = Field(default_factory=uuid4)
    event_version: str = EVENT_VERSION
    occurred_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    status: str


class DataImportCompleted(Event):
    """一次导入完成了（completed）或被撤回了（failed）；范围以 import_tasks 的行为准。"""

    status: str = "completed"
    import_id: UUID
    allow_deletes: object = None
    """只有 true 算数：收事件的从不因为它写成别的就拒收。"""


class EtlCompleted(Event):
    """一个资产的若干天做完了或失败了；太长的分成几份（part、parts），每份是一个事件。"""

    status: Literal["success", "partial_success", "failed"]
    partitions: tuple[date, ...]
    run_id: str
    import_ids: tuple[UUID, ...] = ()
    success_count: int = 0
    error_count: int = 0
    duration_seconds: float = 0.0
    error: str | None = None
    downstream: Literal["included", "pending"] = "pending"
    installation: object = None
    """谁发的：自己那套安装的不再要求一遍。"""
    target: object = None
    """写的是哪个 schema；没有的是旧系统的。"""
    part: int | None = None
    parts: int | None = None


def event_type(subject: str) -> type[Event]:
    """发布到这个主题的事件类型；不认识的主题只检查公共字段。"""
    if subject == DATA_IMPORT_COMPLETED:
        return DataImportCompleted
    return Event if completed_asset(subject) is None else EtlCompleted
