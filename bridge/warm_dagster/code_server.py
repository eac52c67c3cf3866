"""栈的代码服务器：Dagster 自己的命令，只是网页上的分区从有数据的那一年起，不从 2000 年起，一格才看得清。

只有网页看的是它：工人的分区总是从 ETL_PARTITIONS_START 起，更早的数据来了，照样做。那时它停下，监督者再起一个，网页随后也看得见。
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
from datetime import date

from etl_assets.core.business_day import first_shown_day
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.log import configure_logging, get_logger
from etl_assets.core.settings import get_settings
from etl_assets.reports.reports import oldest_day

_LOOK_SECONDS = 60.0

logger = get_logger("bridge.warm_dagster.code_server")  # 以 -m 运行时 __name__ 是 __main__


def main() -> None:
    """应答到收到停止信号，或者数据开始得更早了为止；参数照 `dagster` 的。"""
    configure_logging("code-server")
    # 人写明了从哪天起的，就从那天起
    if "partitions_start" not in get_settings().model_fields_set:
        since = _read_first_day()
        if since is not None:
            os.environ["ETL_SHOWN_SINCE"] = since.isoformat()
            get_settings.cache_clear()
        threading.Thread(target=_watch, args=[since], name="watch-first-day", daemon=True).start()
    runpy.run_module("dagster", run_name="__main__", alter_sys=True)


def _watch(since: date | None) -> None:
    """头一次有了数据，或者有了更早的：停下。晚一分钟只是网页晚一分钟。"""
    while not threading.Event().wait(_LOOK_SECONDS):
        first = _read_first_day()
        if first is not None and (since is None or first < since):
            logger.info("the days shown begin elsewhere now, loading the code again", since=str(first))
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _read_first_day() -> date | None:
    settings = get_settings()
    try:
        oldest = transact(get_engine(), oldest_day, settings.target_schema)
    except Exception as error:  # noqa: BLE001  # 看不了就不改：网页照样要起来
        logger.warning("cannot read where the data begin", error=str(error))
        return None
    return None if oldest is None else first_shown_day(settings, oldest)


if __name__ == "__main__":
    main()
