"""事件的信封（DOMAIN 第 7 节的字段），与一个资产自己认得的事件（资产的 events.py）。不认识 NATS：怎样收、怎样发由桥管。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Generic, TypeVar
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import sqlalchemy as sa

    from etl_assets.core.settings import EtlSettings

EVENT_VERSION = "1.0"


class Event(BaseModel):
    """每个事件都有的字段；多出来的字段原样保留。"""

    model_config = ConfigDict(extra="allow", frozen=True)

    event_id: UUID = Field(default_factory=uuid4)
    event_version: str = EVENT_VERSION
    occurred_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    status: str


AnyEvent = TypeVar("AnyEvent", bound=Event)


@dataclass(frozen=True)
class Asked:
    """一个事件要求了什么：从 asset 起的这些天，没有就是与这里无关；unknown 是它点了名而这里没有的。"""

    asset: str
    days: Sequence[date]
    unknown: Sequence[str]


@dataclass(frozen=True)
class AssetEvent(Generic[AnyEvent]):
    """一个资产自己认得的事件。

    :param name: 主题里 `events.` 后面的。
    :param handle: 一批事件，在一个事务里变成台账里的要求，一一对应。重投的、重放的再来一遍也没有害处。
    """

    name: str
    event_type: type[AnyEvent]
    handle: Callable[[sa.Connection, EtlSettings, Sequence[AnyEvent]], Sequence[Asked]]
