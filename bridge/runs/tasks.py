"""TaskIQ 的任务。`taskiq worker bridge.tasks:broker --receiver bridge.broker:SafeReceiver` 也能用。"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from structlog.contextvars import bind_contextvars
from taskiq import Context, TaskiqDepends, TaskiqEvents, TaskiqState

from bridge.cancelling import cancel_all
from bridge.errors import tolerate
from bridge.events.outbox_publisher import publish_outbox
from bridge.jetstream.stored_messages import stored_message
from bridge.nats_names import EVENTS_STREAM
from bridge.queue.broker import SPARE_REMINDERS, SafeJetStreamBroker
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs.retention import Pruning, keep_pruning
from bridge.runs.run_reconciler import INTERVAL_SECONDS, Ring, reconcile_runs
from bridge.runs.worker import RunWorker, TakenRun
from bridge.side_tasks import pause, start_beside
from bridge.warm_dagster.code_location import RunResult
from etl_assets.core import metrics
from etl_assets.core.database_errors import fault_of
from etl_assets.core.database_sync import transact
from etl_assets.core.errors import PermanentError
from etl_assets.core.log import RepeatedWarning, get_logger
from etl_assets.core.tracing import is_tracing, trace_id_of, traceparent_in
from etl_assets.ledger.claims import RUSH_QUIET_SECONDS, AskingEvent, has_claimable_days, has_days_in_a_rush
from etl_assets.ledger.leases import LeaseState

logger = get_logger(__name__)

HEARTBEAT_SECONDS = 0.25
"""也是取消最迟多久被看见。"""
_CANCEL_SECONDS = 0.1
"""取消之后，隔多久再取消一次正在执行的语句。"""
_LAST_WORDS_SECONDS = 2.0
"""退出之前，发布最后的完成事件最多这么久。"""

_LOAD_AGAIN_SECONDS = 2.0
_NOTE_SECONDS = 1.0
"""打断运行之前，最多等这么久，让 Dagster 里标上正在取消。"""
_ABANDON_SECONDS = 10.0
"""停不下来的运行，收回租约、标成取消最多等这么久；之后由收尾的工人来。"""

_cannot_load = RepeatedWarning(logger, "cannot start, waiting for the database")
_cannot_extend = RepeatedWarning(logger, "cannot extend the lease")
_cannot_write_events = RepeatedWarning(logger, "cannot write the events of the run now")
_cannot_interrupt = RepeatedWarning(logger, "cannot interrupt the run now")
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
    state.reconciling = start_beside("look after runs", lambda: _reconcile(state.run_worker))
    state.pruning = start_beside("prune what is out of retention", lambda: keep_pruning(_pruning_of(state.run_worker)))
    state.unpublished = asyncio.Event()
    state.publishing = start_beside("publish completion events", lambda: _publish(state.run_worker, state.unpublished))
    state.ringing_later = None


async def _load_patiently() -> RunWorker | None:
    """None 表示还没载入就要停下。死了再起解决不了：重起的看不见原因，说的话也没有人看见。"""
    while not broker.stopping.is_set():
        try:
            return await asyncio.to_thread(RunWorker.load, broker.settings)
        except Exception as error:  # 不是服务器不在的，原样抛出
            # 代码载入不了、设置不对、没有 dagster.yaml：等不来
            if isinstance(error, OSError) or isinstance(fault_of(error), PermanentError):
                raise
            tolerate(error, _cannot_load)
        await pause(_LOAD_AGAIN_SECONDS, broker.stopping)
    return None


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def unload_worker(state: TaskiqState) -> None:
    """停下旁边的活；最后一个运行的完成事件这时发布。"""
    if "reconciling" in state:  # 代码载入不了、连不上 NATS 的工人没有它
        beside = (state.reconciling, state.pruning, state.publishing, state.ringing_later)
        # 先停旁边的再发：两边同时读发件箱，同一批就各发一遍
        await cancel_all(*(task for task in beside if task is not None))
        with suppress(Exception):  # 发不出去的，监听器的对账者会发
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await publish_outbox(state.run_worker.engine, broker.connection)


@broker.task(task_name=MATERIALIZE_DUE)
async def materialize_due() -> None:
    """门铃：领一段到期的日子，执行成一个 Dagster 运行。

    没有可领的就结束，要等急雨过去的稍后再敲；还有别的就先替下一个工人敲门。失败由台账记下，何时再试由它定，这条消息不重来。
    只领小的工人把大的转到它不服务的车道：留在事件车道，敲的又是它自己。
    """
    worker: RunWorker = broker.state.run_worker
    small = broker.takes_small_days_only
    claim = await asyncio.to_thread(worker.claim, small=small)
    if claim is None:
        if small and await asyncio.to_thread(
            transact, worker.engine, has_claimable_days, worker.settings.target_schema
        ):
            await broker.ring(MATERIALIZE_DUE, "bulk")
        if await asyncio.to_thread(transact, worker.engine, has_days_in_a_rush, worker.settings.target_schema):
            _ring_later()
        return
    metrics.days_claimed(waited_seconds=claim.waited_seconds)
    # 现在就敲，不等做完：别的工人空着，不该白等一整个运行
    if claim.more:
        await broker.ring(MATERIALIZE_DUE, "event")
    try:
        traceparents = await _read_traceparents(claim.asked_by) if is_tracing() else ()
        result = await _execute(worker, await asyncio.to_thread(worker.start, claim, traceparents))
        if result is not None and result.succeeded and metrics.is_recording():
            broker.state.measuring = asyncio.create_task(_measure(claim.asked_by))
    finally:
        # 运行期间来的门铃发现这些天有人在做，已经散去：再敲一次
        await broker.ring(MATERIALIZE_DUE, "event")


@broker.task(task_name=EXECUTE_RUN)
async def execute_run(run_id: str, context: Context = TaskiqDepends()) -> None:  # noqa: B008  # TaskIQ 这样给出消息
    """执行网页、定时、传感器或回填提交的一个运行；重复投递的找不到事做。

    只领小的工人只做人点的：定时与传感器的也排在事件车道上，却可能很大。
    """
    worker: RunWorker = broker.state.run_worker
    if broker.takes_small_days_only and context.message.labels["lane"] != "interactive":
        await broker.ring(EXECUTE_RUN, "bulk", run_id)
        return
    taken = await asyncio.to_thread(worker.take, run_id)
    if taken is None:
        return
    try:
        await _execute(worker, taken)
    finally:
        if taken.days is not None:
            # 它占着的日子里可能有到期的，做完的上游也可能让下游到期
            await broker.ring(MATERIALIZE_DUE, "event")


async def _execute(worker: RunWorker, taken: TakenRun) -> RunResult | None:
    """在线程里执行，一边续租、看有没有人取消；取消了却停不下来（None）就换掉这个进程。"""
    started = time.monotonic()
    bind_contextvars(run_id=taken.run.run_id, **({"partition": str(taken.days)} if taken.days else {}))
    executing = asyncio.create_task(asyncio.to_thread(worker.execute, taken))
    guarding = asyncio.create_task(_guard(worker, taken))
    try:
        await asyncio.wait({executing, guarding}, return_when=asyncio.FIRST_COMPLETED)
        if executing.done():
            # 只取消，不等它：它的心跳也许正卡在没有回音的连接上
            guarding.cancel()
            result = executing.result()
            _log(taken, result, duration_ms=round((time.monotonic() - started) * 1000))
            return result
        logger.error("the run does not stop, replacing the process", run_id=taken.run.run_id)
        # 先收回租约再换进程：换了就没有人收，别的工人要等到它过期
        await _abandon(worker, taken)
        broker.replacing = True
        return None
    finally:  # 收不了尾的运行，做完的资产也有完成事件
        broker.state.unpublished.set()


def _pruning_of(worker: RunWorker) -> Pruning:
    dagster_url = getattr(worker.instance.run_storage, "postgres_url", None)
    return Pruning(worker.engine, worker.settings, broker.settings, broker.connection, dagster_url)


async def _read_traceparents(asked_by: Sequence[AskingEvent]) -> list[str]:
    """要求它的事件带着的 trace，新的在前；流里已经没有的、没有带的不算。"""
    get, sequences = broker.connection.context.get_msg, [event.stream_sequence for event in asked_by]
    asking = [get(EVENTS_STREAM, sequence) for sequence in sequences if sequence]
    found = await asyncio.gather(*asking, return_exceptions=True)
    headers = [message.headers for message in found if not isinstance(message, BaseException)]
    return [traceparent for each in headers if (traceparent := traceparent_in(each)) is not None]


async def _measure(asked_by: Sequence[AskingEvent]) -> None:
    """从最早的那个事件存进流到现在；在旁边问流，没有人等它。流里已经没有它，就不量。"""
    done_at = datetime.now(UTC)
    if sequences := [event.stream_sequence for event in asked_by if event.stream_sequence]:
        with suppress(Exception):  # 量不成就少一个数
            if event := await stored_message(broker.connection, EVENTS_STREAM, min(sequences)):
                metrics.event_in_tables(seconds=(done_at - event.stored_at).total_seconds())


async def _publish(worker: RunWorker, unpublished: asyncio.Event) -> None:
    """完成事件在旁边发布，下一个运行不等它；发不了的、进程死了没发的还在发件箱里，监听器的对账者会发。"""
    while True:
        await unpublished.wait()
        # 先清再发：发的时候又写进来的会再叫醒一次；反过来，它要等到下一个运行
        unpublished.clear()
        try:
            await publish_outbox(worker.engine, broker.connection)
        except Exception as error:  # noqa: BLE001  # 不是服务器不在的，原样抛出
            tolerate(error, _cannot_publish)


async def _guard(worker: RunWorker, taken: TakenRun) -> None:
    """执行期间续租；有人取消、或租约没了，就让它停下。宽限过了还没停才返回。

    租约没了的再做也提交不了，别的工人已经接手。写 Dagster 的表都在旁边：那里的锁与故障不耽误续租，也不耽误停下。
    """
    flushing = _Aside(worker.flush_events)
    state = LeaseState.VALID
    while state is LeaseState.VALID:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        try:
            state = await asyncio.to_thread(worker.heartbeat, taken.lease)
        except Exception as error:  # noqa: BLE001  # 续不了租不是停下运行的理由；租约真没了，栅栏挡得住
            _cannot_extend.say(type(error).__name__, run_id=taken.run.run_id, error=str(error))
        if state is LeaseState.LOST and taken.ended.is_set():
            await asyncio.Event().wait()  # 自己放下的，没有什么可停；它收了尾，这里就被取消
        # 心跳之后才写日志，也不等它：写要等锁，等得比租约还久，活着的运行就被埋了
        flushing.start()
    noting = _Aside(lambda: worker.note_cancel(taken))
    if state is LeaseState.LOST:
        logger.warning("the lease has gone to another worker", run_id=taken.run.run_id)
    else:  # 先标上再打断，Dagster 才以 CANCELED 收场；标不上也不久等
        await noting.start_and_wait(_NOTE_SECONDS)
    deadline = time.monotonic() + broker.settings.cancel_grace_seconds
    while time.monotonic() < deadline:
        if state is LeaseState.CANCEL_REQUESTED and not noting.succeeded:
            noting.start()
        try:
            # 一遍遍地来：看过请求、还没送到服务器的那条语句，一次取消打断不到
            await asyncio.to_thread(taken.interruption.request)
        except Exception as error:  # noqa: BLE001  # 数据库不在也照样等它停下
            _cannot_interrupt.say(type(error).__name__, run_id=taken.run.run_id, error=str(error))
        await asyncio.sleep(_CANCEL_SECONDS)


class _Aside:
    """要等多久说不准的一件事，在自己的线程里做：至多一个在做，没有人等它，做不成的说一声、下次再来。"""

    def __init__(self, do: Callable[[], object]) -> None:
        self.succeeded = False
        self._do = do
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            # 不借线程池：等着锁的会占住心跳要的线程，还拦着进程退出
            self._thread = threading.Thread(target=self._run, name="aside", daemon=True)
            self._thread.start()

    async def start_and_wait(self, seconds: float) -> None:
        self.start()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, seconds)

    def _run(self) -> None:
        try:
            self._do()
            self.succeeded = True
        except Exception as error:  # noqa: BLE001  # Dagster 的存储不在时抛什么都有可能
            _cannot_write_events.say(type(error).__name__, error=str(error))


async def _abandon(worker: RunWorker, taken: TakenRun) -> None:
    """进程无论如何都要换掉：收不回的租约会过期，标不成的由收尾的工人来标。"""
    try:
        async with asyncio.timeout(_ABANDON_SECONDS):
            await asyncio.to_thread(worker.abandon, taken, grace_seconds=broker.settings.cancel_grace_seconds)
    except Exception:
        logger.exception("cannot abandon the run, another worker will bury it", run_id=taken.run.run_id)


def _ring_later() -> None:
    """急雨里的门铃很多，一个工人至多留一个待敲的；工人这时死去，有对账者。"""

    async def ring() -> None:
        await asyncio.sleep(RUSH_QUIET_SECONDS)
        try:
            await broker.ring(MATERIALIZE_DUE, "event")
        except Exception as error:  # noqa: BLE001  # 没有人看这件活的结局；敲不响的由对账者再敲
            logger.warning("cannot ring now", task=MATERIALIZE_DUE, error=str(error))

    if broker.state.ringing_later is None or broker.state.ringing_later.done():
        broker.state.ringing_later = asyncio.create_task(ring())


async def _reconcile(worker: RunWorker) -> None:
    """按时给死了的运行收尾；数据库或 NATS 不在就等下一次。

    刚回来的那一次不看：租约都过期了，活着的工人正在自己收尾，埋了它们就成了日子的失败。不声不响停了一阵的（虚拟机、
    数据库、我们自己）由时刻看出来，所以看得比租约的三分之一还勤。
    """
    was_away = False
    while True:
        pause_seconds = min(INTERVAL_SECONDS, worker.lease_seconds * 0.3) * random.uniform(0.8, 1.2)  # noqa: S311  # 只为错开时间
        due_at = time.monotonic() + pause_seconds
        await asyncio.sleep(pause_seconds)
        try:
            if was_away:
                await asyncio.to_thread(worker.check_database)
                was_away = False
                continue
            await _ring(await asyncio.to_thread(reconcile_runs, worker, due_at=due_at))
        except Exception as error:  # noqa: BLE001  # 不是服务器不在的，原样抛出
            was_away = True
            tolerate(error, _cannot_look)


async def _ring(rings: Sequence[Ring]) -> None:
    """等着的运行多半有它的门铃：车道上的消息比没结束的运行少了，才从等得最久的补起。

    谁的丢了看不出来，补给了有的，队伍走起来又会少；没有人取的车道上，消息也就不会越积越多。
    """
    if any(ring.task_name == MATERIALIZE_DUE for ring in rings):
        await broker.ring(MATERIALIZE_DUE, "event")
    waiting = [ring for ring in rings if ring.task_name == EXECUTE_RUN]
    if not waiting:
        return
    depths = await broker.lane_depths()
    sent = 0
    for ring in waiting:
        if ring.unfinished is not None and depths[ring.lane] >= ring.unfinished + SPARE_REMINDERS:
            continue
        await broker.remind(ring.task_name, ring.lane, *ring.arguments)
        depths[ring.lane] += 1
        sent += 1
        if sent % SPARE_REMINDERS == 0:  # 别的工人也许正补着
            depths = await broker.lane_depths()


def _log(taken: TakenRun, result: RunResult, *, duration_ms: int) -> None:
    log = logger.info if result.succeeded else logger.error
    log(
        "run finished",
        duration_ms=duration_ms,
        assets=list(taken.assets),
        succeeded=result.succeeded,
        **({} if result.succeeded else {"error": result.error}),
        **({"trace_id": trace_id_of(taken.traceparents[0])} if taken.traceparents else {}),
    )
