"""leads 自己认得的事件：人改了商机，那些客户的订单就重新分到商机。"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, Self
from uuid import UUID

import sqlalchemy as sa
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from etl_assets.core.arrays import array, unnest
from etl_assets.core.asset_events import Asked, AssetEvent, Event
from etl_assets.core.business_day import local_day
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, target_tables
from etl_assets.intake.named_customers import request_customers

MOST_IDS = 1_000
"""再多的分成几个事件：一个事件的长度有上限。"""

Ids = Annotated[tuple[UUID, ...], Field(min_length=1, max_length=MOST_IDS)]


class LeadChanged(Event):
    """人关闭、收回关闭、改派了商机。只说去看谁的，说客户或者商机；改了什么以表里的行为准。"""

    status: str = "changed"
    customer_global_ids: Ids | None = None
    lead_ids: Ids | None = None

    @model_validator(mode="after")
    def _names_one_kind(self) -> Self:
        if (self.customer_global_ids is None) == (self.lead_ids is None):
            raise PydanticCustomError("one_kind", "exactly one of customer_global_ids and lead_ids must be given")
        return self

    @property
    def named(self) -> list[tuple[UUID, bool]]:
        """点了名的编号，各是不是商机的。"""
        return [(each, self.lead_ids is not None) for each in self.lead_ids or self.customer_global_ids or ()]


def deal_again(connection: sa.Connection, settings: EtlSettings, events: Sequence[LeadChanged]) -> list[Asked]:
    """这些客户的商机重新分。没有日子的客户没有订单，留不留下也看他的商机，所以从 customers 起。"""
    ids, are_leads = map(list, zip(*chain.from_iterable(event.named for event in events), strict=True))
    find = _find_customers(target_tables(settings.target_schema), settings.timezone)
    found = {(row.id, row.is_lead): row for row in connection.execute(find, {"ids": ids, "are_leads": are_leads})}
    day_of = {row.customer_key: row.day for row in found.values()}
    asset = "leads" if all(day_of.values()) else "customers"
    days = [request_customers(connection, settings, asset, day_of)] if day_of else []

    def answer(event: LeadChanged) -> Asked:
        unknown = [str(named[0]) for named in event.named if named not in found]
        return Asked(asset, days if len(unknown) < len(event.named) else [], unknown)

    return [answer(event) for event in events]


@lru_cache(maxsize=16)
def _find_customers(tables: TargetTables, timezone: str) -> sa.Select[Any]:
    """一行一个点了名、在这里的编号：它的客户，与客户最后一单的日子。"""
    customers, leads = tables.customers, tables.leads
    ids, are_leads = array("ids", sa.Uuid), array("are_leads", sa.Boolean)
    named = unnest("named", id=ids, is_lead=are_leads)
    owner = sa.case((named.c.is_lead, leads.c.customer_global_id), else_=named.c.id)
    return (
        sa.select(*named.c, customers.c.customer_key, local_day(customers.c.last_order_at, timezone).label("day"))
        .select_from(named)
        .outerjoin(leads, sa.and_(named.c.is_lead, leads.c.lead_id == named.c.id))
        .join(customers, customers.c.customer_global_id == owner)
    )


EVENTS = (AssetEvent("lead.changed", LeadChanged, deal_again),)
