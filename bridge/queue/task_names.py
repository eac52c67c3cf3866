"""任务的名字：监听器与网页只敲门，不必导入任务（那会载入代码位置）。"""

from __future__ import annotations

MATERIALIZE_DUE = "etl.materialize_due"
EXECUTE_RUN = "etl.execute_run"
