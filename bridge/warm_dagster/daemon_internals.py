"""守护进程用到的 Dagster 私有名字：与 bridge.warm_dagster.internals 分开，因为别的进程不必装载守护进程。"""

from __future__ import annotations

from dagster._core.workspace.load_target import WorkspaceFileTarget as WorkspaceFileTarget
from dagster._daemon.controller import daemon_controller_from_instance as daemon_controller_from_instance
from dagster._utils.interrupts import capture_interrupts as capture_interrupts
from dagster._utils.interrupts import setup_interrupt_handlers as setup_interrupt_handlers
