"""任务队列对真 NATS：任务结束才确认，长任务只跑一次，被杀的由别人接手，急的先做，毒的进死信。"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2.errors
import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError
from taskiq.exceptions import SendTaskError, TaskRejectedError
from taskiq.kicker import AsyncKicker

from bridge.errors import BridgeError, StreamMissingError, UnknownLaneError
from bridge.queue import delivery as delivery_module
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.delivery import Delivery
from bridge.queue.receiver import SafeReceiver
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.backoff import Backoff
from etl_assets.core.errors import DatabaseRefusedError, PermanentError, SettingsError, TransientError
from etl_assets.embedded.child_process import identify

from .conftest import NatsServer

WORKER_PROGRAM = Path(__file__).with_name("nap_worker.py")


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(nats_url=nats_server.url, task_ack_wait_seconds=1, task_max_attempts=3)


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "RETRY", Backoff(first_seconds=0.05, longest_seconds=0.05))


@pytest.fixture
async def client(settings: BridgeSettings) -> AsyncIterator[SafeJetStreamBroker]:
    """只投递的一方。"""
    broker = SafeJetStreamBroker(settings)
    await broker.startup()
    yield broker
    await broker.shutdown()


@asynccontextmanager
async def working(broker: SafeJetStreamBroker, *, slots: int = 1) -> AsyncIterator[asyncio.Event]:
    """本进程里的 worker；离开时请它停下，并等它停好。"""
    broker.is_worker_process = True
    stop = asyncio.Event()
    task = asyncio.create_task(SafeReceiver(broker, slots=slots, wait_tasks_timeout=10).listen(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)
        await broker.shutdown()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(25):
        while not condition():
            await asyncio.sleep(0.01)


async def send(client: SafeJetStreamBroker, name: str, *args: Any, lane: Lane = "bulk") -> None:
    await AsyncKicker(name, client, {"lane": lane}).kiq(*args)


async def left_in_queue(client: SafeJetStreamBroker) -> int:
    return (await client.js.stream_info("TASKS")).state.messages


async def queue_is_empty(client: SafeJetStreamBroker) -> None:
    async with asyncio.timeout(25):
        while await left_in_queue(client):
            await asyncio.sleep(0.02)


async def waits_for(client: SafeJetStreamBroker, lane: Lane, workers: int) -> None:
    """这条车道上开着的请求正好是这么多。"""

    async def waiting() -> int | None:
        with contextlib.suppress(NotFoundError):
            return (await client.js.consumer_info("TASKS", lane)).num_waiting
        return None

    async with asyncio.timeout(25):
        while await waiting() != workers:
            await asyncio.sleep(0.02)


async def delivered(client: SafeJetStreamBroker, lane: Lane) -> int:
    """这条车道上取走了、还没了结的。"""
    return (await client.js.consumer_info("TASKS", lane)).num_ack_pending or 0


async def dead_letters(client: SafeJetStreamBroker, count: int) -> list[RawStreamMsg]:
    async with asyncio.timeout(25):
        while (await client.js.stream_info("TASKS_DLQ")).state.messages < count:
            await asyncio.sleep(0.02)
    total = (await client.js.stream_info("TASKS_DLQ")).state.messages
    return [await client.js.get_msg("TASKS_DLQ", sequence) for sequence in range(1, total + 1)]


# ---- 确认 ----------------------------------------------------------------------


async def test_task_is_acknowledged_only_after_it_ended(client: SafeJetStreamBroker, settings: BridgeSettings) -> None:
    worker = SafeJetStreamBroker(settings)
    started, release = asyncio.Event(), asyncio.Event()
    seen: list[str] = []

    @worker.task(task_name="wait")
    async def wait(text: str) -> None:
        started.set()
        await release.wait()
        seen.append(text)

    await send(client, "wait", "中文")
    async with working(worker):
        await asyncio.wait_for(started.wait(), 10)
        assert (await left_in_queue(client), await delivered(client, "bulk")) == (1, 1)
        release.set()
        await queue_is_empty(client)
    assert seen == ["中文"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_task_longer_than_the_ack_wait_runs_once(
    client: SafeJetStreamBroker, settings: BridgeSettings, kind: str
) -> None:
    worker = SafeJetStreamBroker(settings)
    starts: list[float] = []
    seconds = settings.task_ack_wait_seconds * 2.5

    @worker.task(task_name="sync")
    def sleep() -> None:
        starts.append(time.monotonic())
        time.sleep(seconds)

    @worker.task(task_name="async")
    async def sleep_async() -> None:
        starts.append(time.monotonic())
        await asyncio.sleep(seconds)

    await send(client, kind)
    # 另有一个空位等着：不报平安，它就会再拿到一次
    async with working(worker, slots=2):
        await queue_is_empty(client)
    assert len(starts) == 1


async def test_same_task_id_is_stored_once(client: SafeJetStreamBroker) -> None:
    kicker: AsyncKicker[..., Any] = AsyncKicker("anything", client, {}).with_task_id("the-same")
    await kicker.kiq()
    await kicker.kiq()
    assert await left_in_queue(client) == 1


async def test_doorbell_goes_to_its_lane(client: SafeJetStreamBroker, settings: BridgeSettings) -> None:
    rung: list[str] = []
    worker = SafeJetStreamBroker(settings.model_copy(update={"worker_lanes": ("event",)}))
    worker.task(task_name="materialize")(lambda: rung.append("event"))
    await client.ring("materialize", "event")
    async with working(worker):
        await queue_is_empty(client)
    assert rung == ["event"]


async def test_unknown_lane_is_refused(client: SafeJetStreamBroker) -> None:
    with pytest.raises(SendTaskError) as raised:
        await AsyncKicker("anything", client, {"lane": "fast"}).kiq()
    assert isinstance(raised.value.__cause__, UnknownLaneError)
    assert "there is no task lane 'fast': use one of interactive, event, bulk" in str(raised.value.__cause__)


async def test_broker_that_was_not_started_says_so(settings: BridgeSettings) -> None:
    with pytest.raises(BridgeError, match="is not open: start it first"):
        await SafeJetStreamBroker(settings).ring("anything", "event")


# ---- 车道 ----------------------------------------------------------------------


async def test_the_most_urgent_lane_goes_first(client: SafeJetStreamBroker, settings: BridgeSettings) -> None:
    worker = SafeJetStreamBroker(settings)
    order: list[str] = []

    @worker.task(task_name="note")
    async def note(lane: str) -> None:
        order.append(lane)

    for lane in ("bulk", "event", "interactive"):
        for _ in range(2):
            await send(client, "note", lane, lane=lane)
    async with working(worker):
        await queue_is_empty(client)
    assert order == ["interactive", "interactive", "event", "event", "bulk", "bulk"]


async def test_busy_worker_holds_nothing_it_cannot_run(client: SafeJetStreamBroker, settings: BridgeSettings) -> None:
    worker = SafeJetStreamBroker(settings)
    started, release = asyncio.Event(), asyncio.Event()
    order: list[str] = []

    @worker.task(task_name="note")
    async def note(name: str) -> None:
        order.append(name)
        started.set()
        await release.wait()

    await send(client, "note", "first")
    async with working(worker):
        await asyncio.wait_for(started.wait(), 10)
        await send(client, "note", "bulk")
        await send(client, "note", "urgent", lane="interactive")
        assert await delivered(client, "bulk") == 1
        assert await delivered(client, "interactive") == 0
        release.set()
        await queue_is_empty(client)
    assert order == ["first", "urgent", "bulk"]


async def test_two_slots_run_two_tasks_at_once(client: SafeJetStreamBroker, settings: BridgeSettings) -> None:
    worker = SafeJetStreamBroker(settings)
    together = threading.Barrier(2)
    worker.task(task_name="meet")(lambda: together.wait(10))
    for _ in range(2):
        await send(client, "meet")
    async with working(worker, slots=2):
        await queue_is_empty(client)
    assert (await client.js.stream_info("TASKS_DLQ")).state.messages == 0


async def test_of_messages_that_arrive_together_the_most_urgent_is_done_and_the_others_are_given_back(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    """空闲的 worker 在三条车道上等；同时来了三条，做一条，两条立刻归还，而且不算一次尝试。"""
    worker = SafeJetStreamBroker(settings)
    worker.is_worker_process = True
    await worker.startup()
    for lane in ("bulk", "event", "interactive"):
        for _ in range(2):
            await send(client, "anything", lane=lane)
    together = [message for lane in ("bulk", "event", "interactive") if (message := await worker.puller.take(lane))]
    urgent = worker._choose(together)
    assert (len(together), urgent.lane) == (3, "interactive")
    await eventually(lambda: worker.in_hand == {urgent})
    assert (await worker._next_delivery()).lane == "interactive"
    given_back = await worker._next_delivery()
    await given_back.read_forgiven()
    assert (given_back.lane, given_back.message.metadata.num_delivered, given_back.attempt) == ("event", 2, 1)
    await worker.shutdown()


async def test_task_on_another_lane_does_not_wait_behind_a_busy_worker(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    """忙着的 worker 等活时开的请求还在，送来的任务它立刻归还；别的 worker 马上就做，不等 ack_wait。"""
    settings = settings.model_copy(update={"task_ack_wait_seconds": 60})
    busy, idle = (
        SafeJetStreamBroker(settings),
        SafeJetStreamBroker(settings.model_copy(update={"worker_lanes": ("bulk",)})),
    )
    started, release = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    @busy.task(task_name="long")
    async def long() -> None:
        started.set()
        await release.wait()

    busy.task(task_name="short")(lambda: done.append("busy"))
    idle.task(task_name="short")(lambda: done.append("idle"))
    async with working(busy):
        await waits_for(client, "interactive", 1)
        await send(client, "long", lane="interactive")
        await started.wait()
        await send(client, "short", lane="bulk")
        await waits_for(client, "bulk", 0)
        async with working(idle), asyncio.timeout(10):
            await eventually(lambda: done)
        release.set()
        await queue_is_empty(client)
    assert done == ["idle"]
    assert (await client.js.stream_info("TASKS_DLQ")).state.messages == 0


# ---- 失败 ----------------------------------------------------------------------


async def test_failing_task_is_tried_a_bounded_number_of_times(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    worker = SafeJetStreamBroker(settings)
    runs: list[str] = []

    @worker.task(task_name="fail")
    def fail(name: str) -> None:
        runs.append(name)
        raise ValueError(f"{name} is broken\nbadly")

    await send(client, "fail", "crank", lane="event")
    with structlog.testing.capture_logs() as logs:
        async with working(worker):
            (letter,) = await dead_letters(client, 1)
            await queue_is_empty(client)
    headers = letter.headers or {}
    assert runs == ["crank"] * 3
    assert letter.subject == "tasks_dlq.event"
    assert (headers["Etl-Reason"], headers["Etl-Attempts"]) == ("ValueError: crank is broken badly", "3")
    assert headers["Etl-Task"].startswith("fail ")
    assert json.loads(letter.data or b"")["args"] == ["crank"]
    assert [line["event"] for line in logs if line["log_level"] in ("warning", "error")] == [
        "task failed, trying again",
        "task failed, trying again",
        "task dead-lettered",
    ]


@pytest.mark.parametrize("error", [PermanentError("schema is wrong"), TaskRejectedError()])
async def test_permanent_failure_is_dead_lettered_at_once(
    client: SafeJetStreamBroker, settings: BridgeSettings, error: Exception
) -> None:
    worker = SafeJetStreamBroker(settings)
    runs: list[int] = []

    @worker.task(task_name="fail")
    async def fail() -> None:
        runs.append(1)
        raise error

    await send(client, "fail")
    async with working(worker):
        (letter,) = await dead_letters(client, 1)
        await queue_is_empty(client)
    assert runs == [1]
    assert (letter.headers or {})["Etl-Attempts"] == "1"


def refused_by_storage() -> Exception:
    """Dagster 的存储不让做：没有人翻译过。"""
    cause = psycopg2.errors.UndefinedTable('relation "runs" does not exist')
    cause.__setstate__({"pgcode": "42P01"})
    return sa.exc.ProgrammingError("SELECT 1", {}, cause)


@pytest.mark.parametrize(
    "error",
    [
        TransientError("database away"),
        DatabaseRefusedError("no such table"),
        refused_by_storage(),
        sa.exc.TimeoutError("QueuePool limit of size 5 overflow 5 reached"),
        StreamMissingError("tasks.event"),
        SettingsError("ETL_TIMEZONE is wrong"),
        socket.gaierror(-2, "Name or service not known"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_is_not_the_fault_of_a_task_is_not_counted(
    client: SafeJetStreamBroker, settings: BridgeSettings, error: Exception
) -> None:
    worker = SafeJetStreamBroker(settings)
    runs: list[int] = []

    @worker.task(task_name="fail")
    async def fail() -> None:
        runs.append(1)
        if len(runs) <= 2 * settings.task_max_attempts:
            raise error

    await send(client, "fail")
    async with working(worker):
        await eventually(lambda: len(runs) == 2 * settings.task_max_attempts + 1)
        await queue_is_empty(client)
    assert (await client.js.stream_info("TASKS_DLQ")).state.messages == 0


async def test_poison_is_dead_lettered_and_the_next_task_runs(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    worker = SafeJetStreamBroker(settings)
    ran: list[int] = []
    worker.task(task_name="good")(lambda: ran.append(1))
    await client.connection.publish("tasks.event", b"\xff not json", message_id=str(uuid4()))
    await client.connection.publish("tasks.event", b"[]", message_id=str(uuid4()))
    await client.connection.publish("tasks.event", b"x" * 1_000_000, message_id=str(uuid4()))
    await send(client, "good", lane="event")
    async with working(worker):
        letters = await dead_letters(client, 3)
        await queue_is_empty(client)
    assert ran == [1]
    assert letters[0].data == b"\xff not json"
    assert {(letter.headers or {})["Etl-Reason"] for letter in letters} == {"poison: not a task message"}
    cut = letters[2]
    assert cut.data == b"x" * 4_096
    assert (cut.headers or {})["Etl-Original-Bytes"] == "1000000"
    assert (cut.headers or {})["Etl-Sha256"] == hashlib.sha256(b"x" * 1_000_000).hexdigest()


async def test_task_whose_forgiven_deliveries_are_not_known_is_not_buried_for_them(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    """记着它们的流不见了，不等于它们没有：当作第一次，宁可多做一次。"""
    worker = SafeJetStreamBroker(settings)
    worker.is_worker_process = True
    await worker.startup()
    await send(client, "work")
    assert await worker.puller.take("bulk")
    async with asyncio.timeout(10):
        while (again := await worker.puller.take("bulk")) is None:
            await asyncio.sleep(0.1)
    await client.js.delete_stream("TASKS_FORGIVEN")
    delivery = Delivery(again, worker, worker.connection, worker.in_hand)
    await delivery.read_forgiven()
    assert (again.metadata.num_delivered, delivery.attempt) == (2, 1)
    await worker.shutdown()


async def test_task_is_given_back_at_once_though_the_stream_of_forgiven_deliveries_has_vanished(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    """还的人把它建回来：不然每次归还都要等 ack_wait。"""
    patient = settings.model_copy(update={"task_ack_wait_seconds": 60.0})
    worker = SafeJetStreamBroker(patient)
    worker.is_worker_process = True
    await worker.startup()
    await send(client, "work")
    message = await worker.puller.take("bulk")
    assert message is not None
    await client.js.delete_stream("TASKS_FORGIVEN")
    await Delivery(message, worker, worker.connection, worker.in_hand).give_back()
    again = await worker.puller.take("bulk")
    assert again is not None
    delivery = Delivery(again, worker, worker.connection, worker.in_hand)
    await delivery.read_forgiven()
    assert (again.metadata.num_delivered, delivery.attempt) == (2, 1)
    await worker.shutdown()


async def test_task_that_only_another_version_knows_is_passed_on_to_it(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    older, newer = SafeJetStreamBroker(settings), SafeJetStreamBroker(settings)
    ran: list[int] = []
    newer.task(task_name="new.task")(lambda: ran.append(1))
    await send(client, "new.task")
    async with working(older):
        async with asyncio.timeout(25):
            while await last_delivery(client, "bulk") < 2:
                await asyncio.sleep(0.01)
    async with working(newer):
        await queue_is_empty(client)
    assert ran == [1]
    assert (await client.js.stream_info("TASKS_DLQ")).state.messages == 0
    await send(client, "nobodys.task")
    async with working(older):
        (letter,) = await dead_letters(client, 1)
    assert "no worker here knows the task nobodys.task" in (letter.headers or {})["Etl-Reason"]


async def last_delivery(client: SafeJetStreamBroker, lane: Lane) -> int:
    with contextlib.suppress(NotFoundError):
        delivered = (await client.js.consumer_info("TASKS", lane)).delivered
        return delivered.consumer_seq if delivered else 0
    return 0


async def test_task_waits_in_its_queue_while_the_dead_letters_are_full(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    """不丢旧的死信，也不丢它；等的时候不占尝试次数，别的任务照做，日志一分钟一句。"""
    worker = SafeJetStreamBroker(settings)
    ran: list[str] = []

    @worker.task(task_name="work")
    async def work(text: str) -> None:
        ran.append(text)
        if text == "bad":
            raise PermanentError("never")

    await limit_letters(client, 1)
    await send(client, "work", "bad")
    with structlog.testing.capture_logs() as logs:
        async with working(worker):
            await dead_letters(client, 1)
            await send(client, "work", "bad")
            await send(client, "work", "good")
            await eventually(lambda: ran.count("bad") > settings.task_max_attempts + 2 and "good" in ran)
            assert await left_in_queue(client) == 1
            assert (await client.js.stream_info("TASKS_DLQ")).state.messages == 1
            await limit_letters(client, -1)
            letters = await dead_letters(client, 2)
            await queue_is_empty(client)
    assert (letters[1].headers or {})["Etl-Attempts"] == "1"
    assert len([line for line in logs if line["event"].startswith("the dead letters are full")]) == 1


async def limit_letters(client: SafeJetStreamBroker, messages: int) -> None:
    config = (await client.js.stream_info("TASKS_DLQ")).config
    await client.js.update_stream(config, max_msgs=messages)


async def test_task_that_kills_its_workers_is_buried_before_it_runs_again(
    client: SafeJetStreamBroker, settings: BridgeSettings
) -> None:
    settings = settings.model_copy(update={"task_max_attempts": 1})
    worker = SafeJetStreamBroker(settings)
    ran: list[int] = []
    worker.task(task_name="deadly")(lambda: ran.append(1))
    await send(client, "deadly")
    # 取走而没有下文，就像执行它的进程被杀了
    victim = SafeJetStreamBroker(settings)
    victim.is_worker_process = True
    await victim.startup()
    assert await victim.puller.take("bulk")
    await victim.shutdown()
    async with working(worker):
        (letter,) = await dead_letters(client, 1)
    assert ran == []
    assert "every delivery ended without an answer" in (letter.headers or {})["Etl-Reason"]


# ---- 断线与重启 ------------------------------------------------------------------


async def test_killing_and_restarting_nats_loses_no_task(
    client: SafeJetStreamBroker, settings: BridgeSettings, nats_server: NatsServer
) -> None:
    worker = SafeJetStreamBroker(settings)
    started, release = asyncio.Event(), asyncio.Event()
    ran: list[int] = []

    @worker.task(task_name="count")
    async def count(number: int) -> None:
        started.set()
        await release.wait()
        ran.append(number)

    for number in range(20):
        await send(client, "count", number)
    async with working(worker):
        await asyncio.wait_for(started.wait(), 10)
        nats_server.kill()
        release.set()
        await eventually(lambda: ran)
        nats_server.start()
        await send(client, "count", 20)
        await queue_is_empty(client)
    assert set(ran) == set(range(21))


async def test_task_that_ends_while_nats_is_away_is_not_run_again(
    client: SafeJetStreamBroker, settings: BridgeSettings, nats_server: NatsServer
) -> None:
    worker = SafeJetStreamBroker(settings)
    started, release = asyncio.Event(), asyncio.Event()
    ran: list[str] = []

    @worker.task(task_name="wait")
    async def wait() -> None:
        started.set()
        await release.wait()
        ran.append("done")

    await send(client, "wait")
    async with working(worker):
        await asyncio.wait_for(started.wait(), 10)
        nats_server.stop()
        release.set()
        await eventually(lambda: ran)
        nats_server.start()
        await queue_is_empty(client)
    assert ran == ["done"]


# ---- 子进程里的 worker -----------------------------------------------------------


class WorkerProcess:
    """一个真的 worker 进程与它的流水。"""

    def __init__(self, folder: Path, settings: BridgeSettings, name: str) -> None:
        self.journal_path = folder / f"{name}.journal"
        self._log_path = folder / f"{name}.log"
        self._environment = os.environ | {
            "JOURNAL": str(self.journal_path),
            "ETL_NATS_URL": settings.nats_url,
            "ETL_CONNECT_TIMEOUT_SECONDS": "1",
            "ETL_TASK_ACK_WAIT_SECONDS": str(settings.task_ack_wait_seconds),
        }
        self.process: subprocess.Popen[bytes]

    def start(self, command: list[str]) -> None:
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, *command], env=self._environment, stdout=log, stderr=log)

    def lines(self) -> list[str]:
        return self.journal_path.read_text().splitlines() if self.journal_path.exists() else []

    def log(self) -> str:
        return self._log_path.read_text()


@contextmanager
def worker_process(
    folder: Path, settings: BridgeSettings, *command: str, name: str = "worker"
) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(folder, settings, name)
    worker.start(list(command) or [str(WORKER_PROGRAM)])
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


async def test_task_of_a_killed_worker_is_run_by_another(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    await send(client, "nap", "long", 60.0)
    with worker_process(tmp_path, settings, name="first") as first:
        await eventually(first.lines)
    killed_at = time.monotonic()
    with worker_process(tmp_path, settings, name="second") as second:
        await eventually(second.lines)
    assert second.lines() == ["start long"]
    assert time.monotonic() - killed_at < 20


async def test_sigterm_finishes_the_task_in_hand_and_takes_no_other(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    with worker_process(tmp_path, settings) as worker:
        await send(client, "nap", "one", 1.0)
        await send(client, "nap", "two", 1.0)
        await eventually(worker.lines)
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.process.wait, 20) == 0, worker.log()
        assert worker.lines() == ["start one", "end one"]
    assert (await left_in_queue(client), await delivered(client, "bulk")) == (1, 0)


async def test_sigterm_gives_back_what_outlasts_the_grace_time(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"task_ack_wait_seconds": 300.0})
    with worker_process(tmp_path, settings, name="first") as first:
        await send(client, "nap", "endless", 600.0)
        await eventually(first.lines)
        first.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.process.wait, 20) == 0, first.log()
    # 远早于 ack_wait 就到了别人手里
    with worker_process(tmp_path, settings, name="second") as second:
        await eventually(second.lines)
    assert second.lines() == ["start endless"]


async def test_worker_that_cannot_reach_nats_ends_with_one_sentence(
    nats_server: NatsServer, settings: BridgeSettings, tmp_path: Path
) -> None:
    nats_server.kill()
    with worker_process(tmp_path, settings) as worker:
        assert await asyncio.to_thread(worker.process.wait, 30) != 0
    assert (
        worker.log()
        .splitlines()[-1]
        .startswith("bridge.errors.NatsUnavailableError: cannot reach NATS at nats://127.0.0.1:")
    )


async def test_stock_taskiq_worker_runs_tasks_with_the_safe_receiver(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    target = [f"{WORKER_PROGRAM.stem}:build_worker", "--app-dir", str(WORKER_PROGRAM.parent)]
    command = ["-m", "taskiq", "worker", *target, "--workers", "1"]
    await send(client, "nap", "short", 0.0)
    with worker_process(tmp_path, settings, *command, "--receiver", "bridge.broker:SafeReceiver") as worker:
        await queue_is_empty(client)
        worker.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(worker.process.wait, 20)
    assert worker.lines() == ["start short", "end short"]


async def test_worker_of_a_killed_taskiq_manager_finishes_its_task_and_ends(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    target = [f"{WORKER_PROGRAM.stem}:build_worker", "--app-dir", str(WORKER_PROGRAM.parent)]
    command = ["-m", "taskiq", "worker", *target, "--workers", "1", "--receiver", "bridge.broker:SafeReceiver"]
    await send(client, "identify")
    await send(client, "nap", "one", 1.0)
    with worker_process(tmp_path, settings, *command) as manager:
        await eventually(lambda: len(manager.lines()) == 2)
        child = identify(int(manager.lines()[0].split()[1]))
        manager.process.kill()
        await eventually(lambda: child is not None and not child.is_alive())
    assert manager.lines()[1:] == ["start one", "end one"]
    assert await left_in_queue(client) == 0


async def test_process_is_replaced_once_its_task_is_settled(
    client: SafeJetStreamBroker, settings: BridgeSettings, tmp_path: Path
) -> None:
    """同样的命令从头再来，进程号不变；触发它的任务已经了结，不会再来一次。"""
    with worker_process(tmp_path, settings) as worker:
        await send(client, "replace")
        await eventually(worker.lines)
        await send(client, "identify")
        await queue_is_empty(client)
        pid = worker.process.pid
        assert worker.lines() == [f"replace {pid}", f"new {pid}"]


def test_worker_command_without_a_server_ends_with_one_sentence(nats_server: NatsServer, tmp_path: Path) -> None:
    nats_server.stop()
    environment = {
        **os.environ,
        "ETL_NATS_URL": nats_server.url,
        "ETL_CONNECT_TIMEOUT_SECONDS": "1",
        "ETL_STATE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-P", "-m", "bridge.cli.main", "worker"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: cannot reach NATS at nats://127.0.0.1:")
    assert "Traceback" not in result.stderr
