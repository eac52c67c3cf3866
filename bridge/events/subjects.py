"""事件的主题与流的名字；所有收发都用这里的常量。"""

from __future__ import annotations

EVENTS_STREAM = "EVENTS"
EVENTS_PREFIX = "events."
EVENTS_DLQ_STREAM = "EVENTS_DLQ"
EVENTS_DLQ_PREFIX = "events_dlq."

DATA_IMPORT_COMPLETED = "events.data_import.completed"
ORDERS_ETL_COMPLETED = "events.etl.orders.completed"
CUSTOMERS_ETL_COMPLETED = "events.etl.customers.completed"
LEADS_ETL_COMPLETED = "events.etl.leads.completed"

ETL_COMPLETED = {
    "orders": ORDERS_ETL_COMPLETED,
    "customers": CUSTOMERS_ETL_COMPLETED,
    "leads": LEADS_ETL_COMPLETED,
}
"""资产名到它的完成事件。"""


def dead_letter_subject(subject: str) -> str:
    """事件主题到死信主题：events.a.b 变成 events_dlq.a.b。"""
    return EVENTS_DLQ_PREFIX + subject.removeprefix(EVENTS_PREFIX)
