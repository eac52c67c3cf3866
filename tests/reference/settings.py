"""参照实现的设置：DOMAIN.md 点名的那几项及其默认值。"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

from tests.reference.text import fold_status

_SHARED = ("timezone", "partitions_start", "cancelled_statuses", "completed_statuses", "cold_after_days")


@dataclass(frozen=True)
class ReferenceSettings:
    """`today` 是最后一个分区；不给就取时钟，跨零点运行的测试应当给。"""

    timezone: str = "Asia/Shanghai"
    partitions_start: date = date(2000, 1, 1)
    today: date | None = None
    cancelled_statuses: Collection[str] = (
        *("cancelled", "canceled", "closed", "refunded", "已取消", "已关闭", "已退款"),
        *("交易关闭", "交易取消", "退款成功", "voided", "wc-cancelled", "wc-refunded"),
    )
    completed_statuses: Collection[str] = ("completed", "delivered", "交易成功", "已完成")
    cold_after_days: int = 90

    @classmethod
    def like(cls, settings: Any) -> ReferenceSettings:
        """同样的值，取自产品的设置：只按名字取，不导入产品；`today` 是它此刻的最后一个分区。"""
        copied = {name: getattr(settings, name) for name in _SHARED}
        return cls(today=settings.today(), **copied)

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @property
    def last_partition(self) -> date:
        return self.today or datetime.now(self.zone).date()

    def is_cancelled(self, status: str) -> bool:
        return fold_status(status) in {fold_status(listed) for listed in self.cancelled_statuses}

    def is_completed(self, status: str) -> bool:
        """两张单子里都有的状态算取消。"""
        return fold_status(status) in {
            fold_status(listed) for listed in self.completed_statuses
        } and not self.is_cancelled(status)
