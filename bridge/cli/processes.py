"""etl listen、etl worker：栈的一个部分单独运行，给生产环境用。"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import get_args

import click
import structlog

from bridge.cli.options import start_metrics_if_wanted, with_stack
from bridge.settings import LANES, WorkerLane, get_bridge_settings
from bridge.stack.addresses import default_state_dir
from etl_assets.core.backoff import Backoff, failures_in_a_row
from etl_assets.core.database_sync import get_engine
from etl_assets.core.log import configure_logging, get_logger, process_name
from etl_assets.core.settings import get_settings
from etl_assets.core.tracing import start_tracing
from etl_assets.embedded.child_process import ORPHANED, with_launcher

logger = get_logger(__name__)

_LOOK_SECONDS = 0.1
_RESTART = Backoff(first_seconds=2.0, longest_seconds=60.0)  # 代码有错时每个都立刻又死：别让它们占满机器
# 一个运行三十天：每个资产的计划事件合成一个
_DAGSTER_ENVIRONMENT = {"DAGSTER_EMIT_PARTITION_SUBSET_IN_PLANNED_EVENTS": "1"}


@click.command("listen")
@with_stack
def listen_command() -> None:
    """Listen to EVENTS, bring the ledger up to date, ring the workers. Logs one JSON line per event to stderr."""
    configure_logging("listener")
    start_tracing("listener")
    start_metrics_if_wanted(records=True)
    asyncio.run(_listen())


def _check_lanes(_context: click.Context, _parameter: click.Parameter, given: str | None) -> str | None:
    """在这里看：设置的错误说的是 ETL_WORKER_LANES，而写错的是选项。"""
    known = get_args(WorkerLane)
    wanted = [lane.strip() for lane in (given or "").split(",")]
    if unknown := [lane for lane in wanted if lane not in ("", *known)]:
        raise click.BadParameter(f"{unknown[0]!r} is no lane; these are: {', '.join(known)}")
    return given


@click.command("worker")
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of worker processes; each runs one run at a time.",
)
@click.option(
    "--lanes",
    callback=_check_lanes,
    help=f"Comma-separated lanes to serve, of {', '.join(LANES)}; small: of the events only small days [default: ETL_WORKER_LANES or all].",
)
@with_stack
def worker_command(processes: int, lanes: str | None) -> None:
    """Run warm workers: the code location is loaded once, then runs start in milliseconds."""
    if lanes:
        os.environ["ETL_WORKER_LANES"] = lanes
    get_bridge_settings()
    if processes > 1:
        _run_processes(processes)
    else:
        _run_worker()


def _run_worker() -> None:
    os.environ.update(_DAGSTER_ENVIRONMENT)
    configure_logging("worker")
    structlog.contextvars.bind_contextvars(worker=process_name())
    start_tracing("worker")
    start_metrics_if_wanted(records=True)
    from bridge.alerts.watch import start_watching
    from bridge.queue.receiver import serve
    from bridge.runs.tasks import broker

    start_watching(get_settings(), get_bridge_settings(), default_state_dir(), in_worker=True)
    asyncio.run(serve(broker, slots=1))


def _run_processes(count: int) -> None:
    """死了的补上，屡次死的隔得越来越久；SIGTERM 或 Ctrl-C 时让它们做完手里的再走。"""
    configure_logging("workers")
    start_metrics_if_wanted(records=False)  # 在工人之前：它闲着，由它给出
    children = [_WorkerProcess() for _ in range(count)]
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while not stopping:
        for child in children:
            child.keep_up()
        time.sleep(_LOOK_SECONDS)
    for child in children:
        child.process.terminate()
    for child in children:
        child.process.wait()


class _WorkerProcess:
    """一个工人进程，与它死后的那些替身。"""

    def __init__(self) -> None:
        self._failures = 0
        self._restart_at: float | None = None
        self._start()

    def keep_up(self) -> None:
        if self.process.poll() is None:
            return
        now = time.monotonic()
        if self._restart_at is None:
            self._failures = failures_in_a_row(self._failures, lived_seconds=now - self._started_at)
            delay = _RESTART.seconds(self._failures)
            self._restart_at = now + delay
            logger.warning(
                "worker stopped, starting it again",
                pid=self.process.pid,
                exit_code=self.process.returncode,
                restart_in_seconds=delay,
            )
        elif now >= self._restart_at:
            self._restart_at = None
            self._start()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        # 管理者被 kill -9 时：还了手里的任务就走，不会拿着旧代码做下去
        command = [sys.executable, "-P", "-m", "bridge.cli.main", "worker"]
        self.process = subprocess.Popen(with_launcher(command, death_signal=ORPHANED))


async def _listen() -> None:
    from bridge.alerts.watch import start_watching
    from bridge.cancelling import cancel_all
    from bridge.events.due_bell import DueBell
    from bridge.events.handlers import handlers_once_known
    from bridge.events.listener import Listener
    from bridge.events.streams import ensure_event_streams
    from bridge.events.subjects import DATA_IMPORT_COMPLETED
    from bridge.queue.broker import SafeJetStreamBroker
    from bridge.runs.reconciler import reconcile

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings = get_bridge_settings()
    # 先看着：NATS 不在、没有人写下图，监听器还起不来的时候也说得出来
    start_watching(get_settings(), settings, default_state_dir(), in_worker=False)
    broker = SafeJetStreamBroker(settings)
    await broker.startup()
    bell = DueBell(broker, get_engine(), get_settings())
    reconciling = asyncio.create_task(reconcile(stop, bell))
    try:
        # 应用这就可以发布了，不论数据库在不在、有没有人写下图
        await ensure_event_streams(broker.connection, settings, [DATA_IMPORT_COMPLETED])
        if handlers := await handlers_once_known(stop):
            await Listener(settings, handlers=handlers, ring=bell.ring).run(stop)
        await reconciling
    finally:
        await cancel_all(reconciling)
        await broker.shutdown()
