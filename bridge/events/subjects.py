"""事件的主题；所有收发都用这里的。"""

from __future__ import annotations

from bridge.nats_names import DATA_IMPORT_COMPLETED, EVENTS_DLQ_PREFIX, EVENTS_PREFIX, EVERY_ETL_COMPLETED

__all__ = [
    "CUSTOMERS_ETL_COMPLETED",
    "DATA_IMPORT_COMPLETED",
    "EVERY_ETL_COMPLETED",
    "LEADS_ETL_COMPLETED",
    "ORDERS_ETL_COMPLETED",
    "completed_asset",
    "dead_letter_subject",
    "etl_completed",
    "event_subject",
]

ORDERS_ETL_COMPLETED = f"{EVENTS_PREFIX}etl.orders.completed"
CUSTOMERS_ETL_COMPLETED = f"{EVENTS_PREFIX}etl.customers.completed"
LEADS_ETL_COMPLETED = f"{EVENTS_PREFIX}etl.leads.completed"


def etl_completed(asset: str) -> str:
    """一个资产做完了、失败了的主题；上面三个照的就是这条规则。"""
    return EVERY_ETL_COMPLETED.replace("*", asset)


def completed_asset(subject: str) -> str | None:
    """完成事件是哪个资产的；别的主题是 None。"""
    before, after = EVERY_ETL_COMPLETED.split("*")
    asset = subject.removeprefix(before).removesuffix(after)
    return asset if etl_completed(asset) == subject else None


def event_subject(name: str) -> str:
    """资产自己认得的事件（它的 events.py）的主题。"""
    return EVENTS_PREFIX + name


def dead_letter_subject(subject: str) -> str:
    """事件主题到死信主题：events.a.b 变成 events_dlq.a.b。"""
    return EVENTS_DLQ_PREFIX + subject.removeprefix(EVENTS_PREFIX)
