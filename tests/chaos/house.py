"""折腾开始之前的样子：店铺、类型映射、十万个订单的历史。库不是空的，导入多半落在它的日子、订单与客户上。"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import Any
from uuid import UUID, uuid5
from zoneinfo import ZoneInfo

import sqlalchemy as sa

from benchmarks.history import History, fill_history
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME, RawData

HISTORY = History(date(2026, 1, 25), days=300, imports=1_000, orders=100_000, customers=20_000)
DAYS = DayRange(HISTORY.first_day, HISTORY.last_day + timedelta(days=5))
"""历史的与折腾的：历史完了还有几天，最新的一天于是还会动。"""
SHOPS = (SAMPLE_SHOP_NAME, "一店", "二店")
MAPPED_TYPES = ("打样订单", "产前样订单", "大货订单")
UNMAPPED_TYPE = "现货订单"
_NAMESPACE = UUID("5f2d1a52-6a0e-4c0f-9a35-0f3f5a3f8c11")
_ZONE = ZoneInfo("Asia/Shanghai")


SMALL_HISTORY = History(HISTORY.last_day, days=300, imports=100, orders=2_000, customers=400)


def furnish(engine: sa.Engine, settings: EtlSettings, history: History = HISTORY) -> None:
    """先有店铺与映射：历史的每一天都是照它们整天做完的。"""
    raw_data = RawData(engine)
    for shop in SHOPS[1:]:
        raw_data.add_shop(uuid5(_NAMESPACE, shop), shop)
    fill_history(engine, settings, history)


def order_of_history(number: int) -> dict[str, Any]:
    """历史的第 number 个订单，像平台再导出它一次；数字与状态此后本来就要变。"""
    return {
        "order_id": f"H-{number}",
        "shop": SAMPLE_SHOP_NAME,
        "customer_name": HISTORY.customer_of(number),
        "order_type": MAPPED_TYPES[min(number % 7, 2)],
        "order_status": "paid",
        "amount": f"{number % 99_991 / 100:.2f}",
        "quantity": 1 + number % 9,
        "ordered_at": datetime.combine(HISTORY.day_of(number), time(), _ZONE) + timedelta(minutes=number % 1_440),
    }
