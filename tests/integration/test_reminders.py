"""丢了的门铃有人补，不丢的不会越补越多：TASKS 里的消息不比要做的事多出许多。"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRunStatus
from dagster_shared.record import copy

from bridge.cancelling import cancel_all
from bridge.events import due_bell
from bridge.events.due_bell import DueBell
from bridge.nats_names import TASKS_STREAM
from bridge.queue import broker as broker_module
from bridge.queue.broker import SPARE_REMINDERS, SafeJetStreamBroker
from bridge.queue.receiver import SafeReceiver
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from bridge.runs import run_reconciler, tasks
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .warm_runs import announce, status, submit


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "REMINDER_SECONDS", 0.5)
    monkeypatch.setattr(tasks, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(run_reconciler, "QUIET_SECONDS", 0.0)


def submit_many(worker: RunWorker, count: int) -> list[str]:
    """同样的一个运行排着许多个；一个一个建太慢。"""
    run = worker.instance.get_run_by_id(submit(worker, "orders"))
    assert run is not None
    others = [copy(run, run_id=str(uuid4())) for _ in range(count - 1)]
    return [run.run_id, *(worker.instance.add_run(other).run_id for other in others)]


@asynccontextmanager
async def started(nats_server: NatsServer) -> AsyncIterator[SafeJetStreamBroker]:
    broker = SafeJetStreamBroker(BridgeSettings(nats_url=nats_server.url))
    await broker.startup()
    try:
        yield broker
    finally:
        await broker.shutdown()


@asynccontextmanager
async def looking_after_runs(worker: RunWorker, workers: int = 3) -> AsyncIterator[None]:
    """几个工人各自按时看一眼，没有一个做这条车道。"""
    looking = [asyncio.create_task(tasks._reconcile(worker)) for _ in range(workers)]
    try:
        yield
    finally:
        await cancel_all(*looking)


async def depth(broker: SafeJetStreamBroker) -> int:
    return (await broker.js.stream_info(TASKS_STREAM)).state.messages


async def until_depth(broker: SafeJetStreamBroker, wanted: range) -> None:
    async with asyncio.timeout(30):
        while await depth(broker) not in wanted:
            await asyncio.sleep(0.05)


async def test_waiting_runs_are_as_many_messages_and_a_purge_heals(
    worker: RunWorker, raw_data: RawData, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    runs = submit_many(worker, 100)
    async with started(nats_server) as broker:
        monkeypatch.setattr(tasks, "broker", broker)
        bounded = range(len(runs), len(runs) + 3 * SPARE_REMINDERS + 1)
        async with looking_after_runs(worker):
            await until_depth(broker, bounded)
            await asyncio.sleep(2)  # 几十次照看，四个时段
            assert await depth(broker) in bounded
            await broker.js.purge_stream(TASKS_STREAM)
            await until_depth(broker, bounded)
        for run_id in runs[3:]:
            worker.instance.run_storage.delete_run(run_id)
        await broker.js.purge_stream(TASKS_STREAM)
        async with looking_after_runs(worker), working(worker, nats_server, monkeypatch), asyncio.timeout(60):
            while any(status(worker, run_id) is not DagsterRunStatus.SUCCESS for run_id in runs[:3]):
                await asyncio.sleep(0.1)


async def test_look_at_a_full_lane_costs_one_request_and_reads_the_runs_once(
    worker: RunWorker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = submit_many(worker, 3 * SPARE_REMINDERS)
    requests: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        asked = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            requests[name] += 1
            return asked(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    async with started(nats_server) as broker:
        monkeypatch.setattr(tasks, "broker", broker)
        for number in range(len(runs) + SPARE_REMINDERS):
            await broker.remind(EXECUTE_RUN, "interactive", str(number))
        count(SafeJetStreamBroker, "lane_depths")
        count(SafeJetStreamBroker, "remind")
        count(DagsterInstance, "get_run_records")
        count(DagsterInstance, "get_runs")
        rings = await asyncio.to_thread(run_reconciler.reconcile_runs, worker)
        await tasks._ring(rings)
    assert len(rings) == len(runs)
    assert requests == {"lane_depths": 1, "get_run_records": 1}


@asynccontextmanager
async def working(worker: RunWorker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """一个做这些运行的工人。"""
    broker = SafeJetStreamBroker(BridgeSettings(nats_url=nats_server.url))
    broker.is_worker_process = True
    broker.state.run_worker, broker.state.unpublished, broker.state.ringing_later = worker, asyncio.Event(), None
    broker.task(task_name=EXECUTE_RUN)(tasks.execute_run.original_func)
    broker.task(task_name=MATERIALIZE_DUE)(tasks.materialize_due.original_func)
    monkeypatch.setattr(tasks, "broker", broker)
    stop = asyncio.Event()
    serving = asyncio.create_task(SafeReceiver(broker, wait_tasks_timeout=10).listen(stop))
    try:
        while not broker.client.is_connected:
            await asyncio.sleep(0.02)
        yield
    finally:
        stop.set()
        await asyncio.wait_for(serving, 30)
        await broker.shutdown()


async def test_due_days_without_a_worker_are_a_few_messages_and_a_purge_heals(
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broker_module, "REMINDER_SECONDS", 0.001)
    announce(engine, etl_settings, raw_data.add_import([{}]))
    async with started(nats_server) as broker:
        bell = DueBell(broker, engine, etl_settings)
        for _ in range(SPARE_REMINDERS * 2):
            await bell.remind()
        assert await depth(broker) <= SPARE_REMINDERS
        await broker.js.purge_stream(TASKS_STREAM)
        await bell.remind()
        assert await depth(broker) == 1


async def test_listener_stops_ringing_where_nobody_takes_and_begins_again_when_the_queue_is_short(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """每批事件敲一次：工人不在一整天，也不会把 TASKS 敲满。"""
    monkeypatch.setattr(due_bell, "CROWD", 10)
    async with started(nats_server) as broker:
        bell = DueBell(broker, engine, etl_settings)
        for _ in range(30):
            await bell.ring(MATERIALIZE_DUE, "event")
            await bell.remind()
        assert await depth(broker) == 11
        await broker.js.purge_stream(TASKS_STREAM)
        await bell.remind()
        await bell.ring(MATERIALIZE_DUE, "event")
        assert await depth(broker) == 1


async def test_same_reminder_of_several_processes_is_stored_once(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "REMINDER_SECONDS", 3_600)
    async with started(nats_server) as one, started(nats_server) as other:
        for broker in (one, other, one):
            await broker.remind(EXECUTE_RUN, "interactive", "some run")
        await one.remind(EXECUTE_RUN, "interactive", "another run")
        assert await depth(one) == 2
        assert await one.lane_depths() == {"interactive": 2, "event": 0, "bulk": 0}
