"""`etl worker --processes N` 的管理者被 kill -9：它的工人还了手里的任务就走，别的工人把活做完。"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.doorbell import ring_workers
from bridge.runs.run_reconciler import reconcile_runs
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_process import ProcessIdentity, identify, running_pids
from etl_assets.ledger.locks import lock_days
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .warm_runs import announce, wait_until_blocked

DAY = DayRange(date(2026, 1, 5), date(2026, 1, 5))


@contextmanager
def workers(count: int, *, engine: sa.Engine, nats_url: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "home").mkdir(exist_ok=True)
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "ETL_NATS_URL": nats_url,
        "DAGSTER_HOME": str(folder / "home"),
        "ETL_LEASE_SECONDS": "3",
        "ETL_TASK_ACK_WAIT_SECONDS": "60",  # 还回来的才有人做：等不到过期
    }
    command = [sys.executable, "-P", "-m", "bridge.cli.main", "worker", "--processes", str(count)]
    with (folder / "workers.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def children_of(pid: int) -> list[ProcessIdentity]:
    """/proc/<pid>/stat 里 comm 之后第二项是父进程。"""
    found = []
    for each in running_pids():
        try:
            fields = Path(f"/proc/{each}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[1] == str(pid) and (child := identify(each)):
            found.append(child)
    return found


def eventually(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


async def given_back(settings: BridgeSettings) -> int:
    """队列里现在就能取的那个任务，投递过几次；看过照样还回去。"""
    broker = SafeJetStreamBroker(settings.model_copy(update={"worker_lanes": ("event",)}))
    broker.is_worker_process = True
    await broker.startup()
    try:
        message = await broker.puller.take("event")
        assert message is not None, "nothing was given back"
        await broker._hold(message).give_back()
        return message.metadata.num_delivered
    finally:
        await broker.shutdown()


@pytest.mark.timeout(180)
def test_workers_of_a_killed_manager_give_their_tasks_back_and_end(
    worker: RunWorker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    tmp_path: Path,
    read_table: ReadTable,
) -> None:
    settings = BridgeSettings(nats_url=nats_server.url, task_ack_wait_seconds=60)
    announce(engine, etl_settings, raw_data.add_import([{}]))
    with workers(2, engine=engine, nats_url=nats_server.url, folder=tmp_path) as manager:
        eventually(
            lambda: (tmp_path / "workers.log").read_text().count('"ready"') == 2, "the workers do not become ready"
        )
        children = children_of(manager.pid)
        assert len(children) == 2
        with engine.connect() as other, other.begin():
            lock_days(other, "public", DAY)
            asyncio.run(ring_workers(settings, "event"))
            wait_until_blocked(engine)
            manager.send_signal(signal.SIGKILL)
            eventually(
                lambda: not any(child.is_alive() for child in children), "children of a killed manager go on", seconds=8
            )
            assert asyncio.run(given_back(settings)) == 2
    eventually(lambda: reconcile_runs(worker), "the lease of the killed run does not expire", seconds=10)
    claim = worker.claim()
    assert claim is not None
    assert worker.execute(worker.start(claim)).succeeded
    assert read_table("business_leads").height == 1
