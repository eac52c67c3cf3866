"""栈的守护进程：Dagster 自己的，只是存储用我们的连接池。dagster-postgres 每条语句新建一个连接，闲着时那就是它一半的 CPU。"""

from __future__ import annotations

import sys

from bridge.warm_dagster.daemon_internals import (
    WorkspaceFileTarget,
    capture_interrupts,
    daemon_controller_from_instance,
    setup_interrupt_handlers,
)
from bridge.warm_dagster.instance import open_lean_instance


def main(workspace: str) -> None:
    """做到收到停止信号为止。"""
    setup_interrupt_handlers()
    target = WorkspaceFileTarget([workspace])
    try:
        with (
            capture_interrupts(),
            open_lean_instance() as instance,
            daemon_controller_from_instance(instance, target, log_format="json") as controller,
        ):
            controller.check_daemon_loop()
    except KeyboardInterrupt:
        pass  # 要它停下


if __name__ == "__main__":
    main(sys.argv[1])
