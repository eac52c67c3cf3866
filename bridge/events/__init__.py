"""事件的约定：主题、信封、处理器的声明；外围应用也从这里发布事件。"""

from bridge.events.envelope import DataImportCompleted, EtlCompleted
from bridge.events.publish import EventPublisher, PublishedEvent, publish_event, publish_event_sync
from etl_assets.core.asset_events import Event

__all__ = [
    "DataImportCompleted",
    "EtlCompleted",
    "Event",
    "EventPublisher",
    "PublishedEvent",
    "publish_event",
    "publish_event_sync",
]
