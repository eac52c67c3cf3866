"""栈的网页：Dagster 自己的应用，前面一道门，在监督者给的套接字上应答。"""

from __future__ import annotations

import os
import socket
import sys

import uvicorn

from bridge.settings import get_bridge_settings
from bridge.warm_dagster.instance import open_lean_instance
from bridge.warm_dagster.ui_guard import UiGuard
from bridge.warm_dagster.webserver_internals import (
    WorkspaceFileTarget,
    WorkspaceProcessContext,
    __version__,
    create_app_from_workspace_process_context,
)
from etl_assets.core.log import configure_logging, get_logger

# dagster-webserver 命令的缺省值
_STATEMENT_TIMEOUT_MILLISECONDS = 15_000
_POOL_RECYCLE_SECONDS = 3_600
_POOL_MAX_OVERFLOW = 20
_LIVE_DATA_POLL_MILLISECONDS = 2_000

_EVENTS_AT_ONCE = "500"
"""Dagster 建一个运行，计划的每个资产、每个检查各写一个事件；一起写，点击就快一百毫秒。"""

logger = get_logger("bridge.warm_dagster.webserver")  # 以 -m 运行时 __name__ 是 __main__


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            logger.info("ready")


def main(descriptor: str, workspace: str) -> None:
    """应答到收到停止信号为止。"""
    os.environ["DAGSTER_EVENT_BATCH_SIZE"] = _EVENTS_AT_ONCE
    configure_logging("webserver")
    listener = socket.socket(fileno=int(descriptor))
    with open_lean_instance() as instance:
        instance.optimize_for_webserver(_STATEMENT_TIMEOUT_MILLISECONDS, _POOL_RECYCLE_SECONDS, _POOL_MAX_OVERFLOW)
        target = WorkspaceFileTarget([workspace])
        settings = get_bridge_settings()
        with WorkspaceProcessContext(instance, target, version=__version__, read_only=settings.ui_read_only) as context:
            app = create_app_from_workspace_process_context(context, live_data_poll_rate=_LIVE_DATA_POLL_MILLISECONDS)
            guarded = UiGuard(app, hosts=settings.ui_hosts, read_only=settings.ui_read_only)
            _Server(uvicorn.Config(guarded, log_config=None, access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
