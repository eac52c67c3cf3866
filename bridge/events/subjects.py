"""事件的主题与流的名字；所有收发都用这里的。"""

from __future__ import annotations

EVENTS_STREAM = "EVENTS"
EVENTS_PREFIX = "events."
EVENTS_DLQ_STREAM = "EVENTS_DLQ"
EVENTS_DLQ_PREFIX = "events_dlq."

DATA_IMPORT_COMPLETED = f"{EVENTS_PREFIX}data_import.completed"
EVERY_ETL_COMPLETED = f"{EVENTS_PREFIX}etl.*.completed"
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
