"""事件点名的客户：给他们留标记，让一个按客户算的资产去修，只做他们。"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import lru_cache

import sqlalchemy as sa

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.claims import quietest_day
from etl_assets.ledger.requests import request_days
from etl_assets.services.order_index import insert_marks


def request_customers(
    connection: sa.Connection, settings: EtlSettings, asset: str, customers: Mapping[str, date | None]
) -> date:
    """从 asset 起重做这些客户（customer_key → 他有订单的一天；没有的是 None），返回哪一天的运行去做。

    一个客户在哪一天的运行里修都一样，标记说由哪一天的去修。所以再多的客户也只要求一天：他们的日子里没有活挡着的
    最早的一天；都挡着，或者没有日子，就是今天；今天也挡着，还是最早的。
    """
    target, partitions = settings.target_schema, partition_range(settings)
    days = {day for day in customers.values() if day is not None and partitions.first <= day <= partitions.last}
    day = quietest_day(connection, target, asset, days | {partitions.last})
    connection.execute(_mark(target, asset), {"customer_keys": list(customers), "day": day})
    request_days(connection, target, [day], asset=asset, changed_only=True)
    return day


@lru_cache(maxsize=16)
def _mark(target: str, asset: str) -> sa.Insert:
    named = unnest("named", customer_key=array("customer_keys", sa.Text))
    return insert_marks(target, sa.select(named.c.customer_key), sa.bindparam("day", type_=sa.Date), since=asset)
