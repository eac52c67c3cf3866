"""不论有哪些资产都有的事件，与每个主题收什么事件；信封（Event）在 etl_assets/core/asset_events.py。"""

from __future__ import annotations

from datetime import date
from typing import Literal
from uuid import UUID

from bridge.events.asset_events import asset_events
from bridge.events.subjects import DATA_IMPORT_COMPLETED, completed_asset
from etl_assets.core.asset_events import Event

ENVELOPE_FIELDS = ("event_id", "event_version", "occurred_at", "status")
"""收到的事件必须带的字段；自己造事件时由默认值补上。"""

IMPORT_STATUSES = ("completed", "failed")
"""只有这些状态的导入事件要求什么。"""


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
    if completed_asset(subject) is not None:
        return EtlCompleted
    of_asset = asset_events().get(subject)
    return Event if of_asset is None else of_asset.event_type
