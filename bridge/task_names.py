"""任务的名字：监听器只敲门，不必导入任务（那会导入 Dagster）。"""

from __future__ import annotations

MATERIALIZE_DUE = "etl.materialize_due"
