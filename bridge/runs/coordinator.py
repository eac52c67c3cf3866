"""运行协调器：网页、定时、传感器、回填提交的运行都进同一个任务队列，留在 QUEUED，直到一个工人接手。

由 dagster.yaml 指名，活在网页与守护进程里；从不载入用户代码。
"""

from __future__ import annotations

from typing import Any

from dagster import DagsterRun

from bridge.runs.launcher import WarmRunLauncher
from bridge.runs.run_queue import QueuesRuns
from bridge.warm_dagster.internals import RunCoordinator, SubmitRunContext
from bridge.warm_dagster.runs import enqueue


class TaskQueueRunCoordinator(QueuesRuns, RunCoordinator[Any]):
    """没有第二个队列，也没有轮询。"""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = self.tag(self._instance, context.dagster_run)
        enqueue(self._instance, run)
        self.ring(run)
        return self._instance.get_run_by_id(run.run_id) or run

    def cancel_run(self, run_id: str) -> bool:
        launcher: WarmRunLauncher = self._instance.run_launcher
        return launcher.terminate(run_id)
