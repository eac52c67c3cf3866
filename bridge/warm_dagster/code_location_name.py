"""代码位置的名字：工人载入它，代码服务器提供它，网页凭名字重新执行运行。"""

from __future__ import annotations

CODE_MODULE = "etl_assets.definitions"
LOCATION_NAME = "etl_assets"
JOB_NAME = "etl"
