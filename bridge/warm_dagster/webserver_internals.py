"""网页进程用到的 Dagster 私有名字：与 bridge.warm_dagster.internals 分开，因为别的进程不必装载整个 GraphQL。"""

from __future__ import annotations

from dagster._core.workspace.context import WorkspaceProcessContext as WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget as WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context as create_app_from_workspace_process_context
from dagster_webserver.version import __version__ as __version__
