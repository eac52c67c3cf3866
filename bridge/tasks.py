"""TaskIQ 的任务。`taskiq worker bridge.tasks:broker --receiver bridge.broker:SafeReceiver` 也能用。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from taskiq import TaskiqEvents, TaskiqState

from bridge.broker import SafeJetStreamBroker
from bridge.outbox_publisher import publish_outbox
from bridge.run_worker import RunWorker
from bridge.task_names import MATERIALIZE_DUE
from etl_assets.core.errors import EtlError
from etl_assets.core.log import get_logger
from etl_assets.services.leases import Claim

logger = get_logger(__name__)

broker = SafeJetStreamBroker()


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def load_worker(state: TaskiqState) -> None:
    """接任务之前载入代码位置，只此一次。"""
    state.run_worker = await asyncio.to_thread(RunWorker.load, broker.settings)


@broker.task(task_name=MATERIALIZE_DUE)
async def materialize_due() -> None:
    """门铃：领一段到期的日子，执行成一个 Dagster 运行。

    没有可领的就结束；还有别的就先替下一个工人敲门。失败由台账记下，何时再试由它定，这条消息不重来。
    """
    worker: RunWorker = broker.state.run_worker
    claim = await asyncio.to_thread(worker.claim)
    if claim is None:
        return
    if claim.more:
        await broker.ring(MATERIALIZE_DUE, "event")
    async with _heartbeat(worker, claim):
        result = await asyncio.to_thread(worker.execute, claim)
    log = logger.info if result.succeeded else logger.error
    log(
        "run finished",
        run_id=claim.lease.run_id,
        days=str(claim.days),
        assets=list(claim.assets),
        succeeded=result.succeeded,
        **({} if result.succeeded else {"error": result.error}),
    )
    await publish_outbox(worker.engine, broker.connection)
    # 运行期间来的门铃发现这些天有人在做，已经散去：再敲一次
    await broker.ring(MATERIALIZE_DUE, "event")


@asynccontextmanager
async def _heartbeat(worker: RunWorker, claim: Claim) -> AsyncIterator[None]:
    """执行期间续租；续不上就记一行，提交时的栅栏自会拦住。"""
    beating = asyncio.create_task(_extend_lease(worker, claim))
    try:
        yield
    finally:
        beating.cancel()


async def _extend_lease(worker: RunWorker, claim: Claim) -> None:
    while True:
        await asyncio.sleep(worker.lease_seconds / 3)
        try:
            held = await asyncio.to_thread(worker.extend_lease, claim)
        except EtlError as error:
            logger.warning("cannot extend the lease", run_id=claim.lease.run_id, error=str(error))
        else:
            if not held:
                logger.warning("the lease has gone to another worker", run_id=claim.lease.run_id)
                return
