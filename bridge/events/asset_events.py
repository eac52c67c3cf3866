"""各资产自己认得的事件，按主题；声明在资产的文件夹里（events.py），这里只是找到它们。"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from bridge.events.subjects import event_subject
from etl_assets.core.asset_events import AssetEvent
from etl_assets.core.asset_folders import asset_folders, events_of


def events_by_subject(asset: str) -> Mapping[str, AssetEvent[Any]]:
    return {event_subject(event.name): event for event in events_of(asset)}


@lru_cache(maxsize=1)
def asset_events() -> Mapping[str, AssetEvent[Any]]:
    """这份代码里全部资产的。"""
    return MappingProxyType(
        {subject: event for asset in asset_folders() for subject, event in events_by_subject(asset).items()}
    )
