"""子进程里的 worker 程序：任务开始与结束时各往 JOURNAL 指的文件记一行。"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.receiver import serve


def build_worker() -> SafeJetStreamBroker:
    worker = SafeJetStreamBroker()

    def note(line: str) -> None:
        with Path(os.environ["JOURNAL"]).open("a") as journal:
            journal.write(line + "\n")

    @worker.task(task_name="nap")
    def nap(name: str, seconds: float) -> None:
        note(f"start {name}")
        time.sleep(seconds)
        note(f"end {name}")

    @worker.task(task_name="replace")
    def replace() -> None:
        note(f"replace {os.getpid()}")
        worker.replacing = True

    @worker.task(task_name="identify")
    def identify() -> None:
        note(f"{'old' if worker.replacing else 'new'} {os.getpid()}")

    return worker


if __name__ == "__main__":
    asyncio.run(serve(build_worker(), grace_seconds=2))
