"""leads 自己认得的事件：人改了商机，那些客户的订单就重新分到商机。"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Self
from uuid import UUID

import sqlalchemy as sa
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from etl_assets.core.arrays import unnest
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


def deal_again(connection: sa.Connection, settings: EtlSettings, events: Sequence[LeadChanged]) -> Sequence[Asked]:
    """这些客户的商机重新分。没有订单的客户，留不留下也看他的商机，所以从 customers 起。"""
    named = [
        (position, named_id, event.lead_ids is not None)
        for position, event in enumerate(events)
        for named_id in event.lead_ids or event.customer_global_ids or ()
    ]
    positions, ids, are_leads = map(list, zip(*named, strict=True))
    find = _find_customers(target_tables(settings.target_schema), settings.timezone)
    rows = connection.execute(find, {"positions": positions, "ids": ids, "are_leads": are_leads}).all()
    known = [row for row in rows if row.customer_key is not None]
    unknown = defaultdict[int, list[str]](list)
    for row in rows:
        if row.customer_key is None:
            unknown[row.position].append(str(row.id))
    asset = "leads" if all(row.has_orders for row in known) else "customers"
    days = (request_customers(connection, settings, asset, {row.customer_key: row.day for row in known}),) if known else ()
    concerned = {row.position for row in known}
    return [Asked(asset, days if position in concerned else (), tuple(unknown[position])) for position in range(len(events))]


@lru_cache(maxsize=16)
def _find_customers(tables: TargetTables, timezone: str) -> sa.Select[Any]:
    """一行一个点了名的编号，与它的客户、客户最后一单的日子；不在这里的，客户是 NULL。"""
    customers, leads = tables.customers, tables.leads
    named = unnest(
        "named",
        position=sa.bindparam("positions", type_=sa.ARRAY(sa.Integer)),
        id=sa.bindparam("ids", type_=sa.ARRAY(sa.Uuid)),
        is_lead=sa.bindparam("are_leads", type_=sa.ARRAY(sa.Boolean)),
    )
    owner = sa.case((named.c.is_lead, leads.c.customer_global_id), else_=named.c.id)
    last_order_at = customers.c.last_order_at
    day, has_orders = local_day(last_order_at, timezone).label("day"), last_order_at.is_not(None).label("has_orders")
    return (
        sa.select(named.c.position, named.c.id, customers.c.customer_key, day, has_orders)
        .select_from(named)
        .outerjoin(leads, sa.and_(named.c.is_lead, leads.c.lead_id == named.c.id))
        .outerjoin(customers, customers.c.customer_global_id == owner)
    )


EVENTS = (AssetEvent("lead.changed", LeadChanged, deal_again),)
