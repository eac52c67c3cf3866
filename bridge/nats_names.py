"""NATS 里的流与主题的名字。在最底下：什么也不用装载就读得到，监督者写角色的权限时要它们。"""

from __future__ import annotations

EVENTS_STREAM = "EVENTS"
EVENTS_PREFIX = "events."
EVENTS_DLQ_STREAM = "EVENTS_DLQ"
EVENTS_DLQ_PREFIX = "events_dlq."

DATA_IMPORT_COMPLETED = f"{EVENTS_PREFIX}data_import.completed"
EVERY_ETL_COMPLETED = f"{EVENTS_PREFIX}etl.*.completed"

TASKS_STREAM = "TASKS"
TASKS_DLQ_STREAM = "TASKS_DLQ"
TASKS_FORGIVEN_STREAM = "TASKS_FORGIVEN"
TASKS_SUBJECT = "tasks"
TASKS_DLQ_SUBJECT = "tasks_dlq"
TASKS_FORGIVEN_SUBJECT = "tasks_forgiven"
