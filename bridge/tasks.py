"""TaskIQ 的任务。`taskiq worker bridge.tasks:broker --receiver bridge.broker:SafeReceiver` 也能用。"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

from taskiq import TaskiqEvents, TaskiqState

from bridge.broker import SafeJetStreamBroker
from bridge.dagster_adapter import RunResult
from bridge.errors import BridgeError
from bridge.outbox_publisher import publish_outbox
from bridge.run_reconciler import INTERVAL_SECONDS, reconcile_runs
from bridge.run_worker import HeldRun, RunWorker
from bridge.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from etl_assets.core.database_errors import fault_of, say_refused
from etl_assets.core.errors import DatabaseRefusedError, TransientError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.services.leases import RUSH_QUIET_SECONDS, LeaseState

logger = get_logger(__name__)

HEARTBEAT_SECONDS = 0.25
"""也是取消最迟多久被看见。"""
_CANCEL_SECONDS = 0.1
"""取消之后，隔多久再取消一次正在执行的语句。"""
_LAST_WORDS_SECONDS = 2.0
"""退出之前，发布最后的完成事件最多这么久。"""

_LOAD_AGAIN_SECONDS = 2.0

_cannot_load = RepeatedWarning(logger, "cannot start, waiting for the database")
_cannot_extend = RepeatedWarning(logger, "cannot extend the lease")
_cannot_publish = RepeatedWarning(logger, "completion events cannot be published now")
_cannot_look = RepeatedWarning(logger, "cannot look after runs now")

broker = SafeJetStreamBroker()


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def load_worker(state: TaskiqState) -> None:
    """接任务之前载入代码位置，只此一次；数据库不在、不让做，就在这里等它。"""
    loaded = await _load_patiently()
    if loaded is None:
        return
    state.run_worker = loaded
    state.reconciling = asyncio.create_task(_reconcile(state.run_worker))
    state.unpublished = asyncio.Event()
    state.publishing = asyncio.create_task(_publish(state.run_worker, state.unpublished))
    state.ringing_later = None


async def _load_patiently() -> RunWorker | None:
    """None 表示还没载入就要停下。死了再起解决不了：重起的看不见原因，说的话也没有人看见。"""
    while not broker.stopping.is_set():
        try:
            return await asyncio.to_thread(RunWorker.load, broker.settings)
        except Exception as error:
            fault = fault_of(error)
            if not isinstance(fault, TransientError) or isinstance(error, OSError):  # 没有 dagster.yaml 之类，等不来
                raise
            if isinstance(fault, DatabaseRefusedError):
                say_refused(fault)
            else:
                _cannot_load.say(type(fault).__name__, error=str(fault))
        with suppress(TimeoutError):
            await asyncio.wait_for(broker.stopping.wait(), _LOAD_AGAIN_SECONDS)
    return None


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def unload_worker(state: TaskiqState) -> None:
    """停下旁边的活；最后一个运行的完成事件这时发布。"""
    if "reconciling" in state:  # 代码载入不了、连不上 NATS 的工人没有它
        state.reconciling.cancel()
        state.publishing.cancel()
        if state.ringing_later:
            state.ringing_later.cancel()
        with suppress(Exception):  # 发不出去的，监听器的对账者会发
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await publish_outbox(state.run_worker.engine, broker.connection)


@broker.task(task_name=MATERIALIZE_DUE)
async def materialize_due() -> None:
    """门铃：领一段到期的日子，执行成一个 Dagster 运行。

    没有可领的就结束，要等急雨过去的稍后再敲；还有别的就先替下一个工人敲门。失败由台账记下，何时再试由它定，这条消息不重来。
    """
    worker: RunWorker = broker.state.run_worker
    claim = await asyncio.to_thread(worker.claim)
    if claim is None:
        if await asyncio.to_thread(worker.has_days_in_a_rush):
            _ring_later()
        return
    if claim.more:
        await broker.ring(MATERIALIZE_DUE, "event")
    await _execute(worker, await asyncio.to_thread(worker.start, claim))
    # 运行期间来的门铃发现这些天有人在做，已经散去：再敲一次
    await broker.ring(MATERIALIZE_DUE, "event")


@broker.task(task_name=EXECUTE_RUN)
async def execute_run(run_id: str) -> None:
    """执行网页、定时、感应器或回填提交的一个运行；重复投递的找不到事做。"""
    worker: RunWorker = broker.state.run_worker
    held = await asyncio.to_thread(worker.take, run_id)
    if held is None:
        return
    await _execute(worker, held)
    if held.days is not None:
        # 它占着的日子里可能有到期的，做完的上游也可能让下游到期
        await broker.ring(MATERIALIZE_DUE, "event")


async def _execute(worker: RunWorker, held: HeldRun) -> None:
    """在线程里执行，一边续租、看有没有人取消；取消了却停不下来就换掉这个进程。"""
    executing = asyncio.create_task(asyncio.to_thread(worker.execute, held))
    guarding = asyncio.create_task(_guard(worker, held))
    await asyncio.wait({executing, guarding}, return_when=asyncio.FIRST_COMPLETED)
    if executing.done():
        guarding.cancel()
        _log(held, executing.result())
    else:
        grace_seconds = broker.settings.cancel_grace_seconds
        logger.error("the run does not stop, replacing the process", run_id=held.run.run_id)
        await asyncio.to_thread(worker.abandon, held, grace_seconds=grace_seconds)
        broker.replace_process_once_settled()
    broker.state.unpublished.set()


async def _publish(worker: RunWorker, unpublished: asyncio.Event) -> None:
    """完成事件在旁边发布，下一个运行不等它；发不了的、进程死了没发的还在发件箱里，监听器的对账者会发。"""
    while True:
        await unpublished.wait()
        unpublished.clear()
        try:
            await publish_outbox(worker.engine, broker.connection)
        except Exception as error:  # noqa: BLE001  # NATS 或数据库不在
            _cannot_publish.say(type(error).__name__, error=str(error))


async def _guard(worker: RunWorker, held: HeldRun) -> None:
    """执行期间续租；有人取消、或租约没了，就让它停下。宽限过了还没停才返回。

    租约没了的再做也提交不了，别的工人已经接手。
    """
    state = LeaseState.HELD
    while state is LeaseState.HELD:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        try:
            state = await asyncio.to_thread(worker.heartbeat, held)
        except Exception as error:  # noqa: BLE001  # 续不了租不是停下运行的理由；租约真没了，栅栏挡得住
            _cannot_extend.say(held.run.run_id, run_id=held.run.run_id, error=str(error))
    if state is LeaseState.CANCEL_REQUESTED:
        await asyncio.to_thread(worker.note_cancel, held)
    else:
        logger.warning("the lease has gone to another worker", run_id=held.run.run_id)
    deadline = time.monotonic() + broker.settings.cancel_grace_seconds
    while time.monotonic() < deadline:
        await asyncio.to_thread(held.interruption.request)
        await asyncio.sleep(_CANCEL_SECONDS)


def _ring_later() -> None:
    """急雨里的门铃很多，一个工人至多留一个待敲的；工人这时死去，有对账者。"""
    if broker.state.ringing_later is None or broker.state.ringing_later.done():
        broker.state.ringing_later = asyncio.create_task(_ring_after(RUSH_QUIET_SECONDS))


async def _ring_after(delay_seconds: float) -> None:
    await asyncio.sleep(delay_seconds)
    try:
        await broker.ring(MATERIALIZE_DUE, "event")
    except BridgeError as error:
        logger.warning("cannot ring now", task=MATERIALIZE_DUE, error=str(error))


async def _reconcile(worker: RunWorker) -> None:
    """按时给死了的运行收尾；数据库或 NATS 不在就等下一次。

    刚回来的那一次不看：租约都过期了，活着的工人正在自己收尾，埋了它们就成了日子的失败。
    """
    was_away = False
    while True:
        await asyncio.sleep(INTERVAL_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311  # 只为错开时间
        try:
            if was_away:
                await asyncio.to_thread(worker.check_database)
                was_away = False
                continue
            for ring in await asyncio.to_thread(reconcile_runs, worker):
                await broker.ring(ring.task_name, ring.lane, *ring.arguments)
        except Exception as error:  # noqa: BLE001  # Dagster 的存储不在时抛什么都有可能
            was_away = True
            if isinstance(fault := fault_of(error), DatabaseRefusedError):
                say_refused(fault)
                continue
            _cannot_look.say(type(error).__name__, error=str(error))


def _log(held: HeldRun, result: RunResult) -> None:
    log = logger.info if result.succeeded else logger.error
    log(
        "run finished",
        run_id=held.run.run_id,
        days=str(held.days),
        assets=list(held.assets),
        succeeded=result.succeeded,
        **({} if result.succeeded else {"error": result.error}),
    )
