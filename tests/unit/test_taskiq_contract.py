"""bridge.queue 依赖的 TaskIQ 内部行为：升级移动了其中任何一处，这里说明是哪一处。"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from taskiq import AckableMessage, AsyncBroker, BrokerMessage, InMemoryBroker, TaskiqEvents, TaskiqMessage, TaskiqResult
from taskiq.acks import AckController
from taskiq.kicker import AsyncKicker
from taskiq.receiver import Receiver
from taskiq.serializers import JSONSerializer
from taskiq_nats import PullBasedJetStreamBroker

from bridge.queue.broker import SafeJetStreamBroker


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Receiver.callback, ["self", "message", "raise_err"]),
        (Receiver.run_task, ["self", "target", "message", "ack_controller"]),
        (Receiver.listen, ["self", "finish_event"]),
        (AsyncKicker.__init__, ["self", "task_name", "broker", "labels", "return_type"]),
    ],
)
def test_overridden_methods_have_the_known_parameters(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_receiver_accepts_the_options_that_are_forced() -> None:
    known = inspect.signature(Receiver.__init__).parameters
    assert {
        "executor",
        "max_async_tasks",
        "max_async_tasks_jitter",
        "max_prefetch",
        "ack_type",
        "wait_tasks_timeout",
    } <= set(known)


def test_constructing_the_broker_reads_nothing_and_connects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETL_NATS_URL", "not a url")
    broker = SafeJetStreamBroker()
    assert isinstance(broker, PullBasedJetStreamBroker)
    assert not broker.client.is_connected
    assert isinstance(broker.serializer, JSONSerializer)


class OneAtATime(InMemoryBroker):
    """记下 TaskIQ 什么时候来要消息。"""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.acknowledged = 0

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:  # type: ignore[override]  # 内存 broker 标得比基类窄
        while True:
            self.asked += 1
            yield AckableMessage(data=self.formatter.dumps(_message()).message, ack=self._acknowledge)

    def _acknowledge(self) -> None:
        self.acknowledged += 1


class RecordingReceiver(Receiver):
    """记下 run_task 的结局，像 SafeReceiver 那样。"""

    results: list[TaskiqResult[Any]]

    async def run_task(
        self, target: Any, message: TaskiqMessage, ack_controller: AckController | None = None
    ) -> TaskiqResult[Any]:
        result = await super().run_task(target, message, ack_controller)
        self.results.append(result)
        return result


def _message(name: str = "contract") -> TaskiqMessage:
    return TaskiqMessage(task_id="1", task_name=name, labels={}, args=[], kwargs={})


async def test_receiver_asks_for_a_message_only_when_a_slot_is_free() -> None:
    broker = OneAtATime()
    release = asyncio.Event()
    started = asyncio.Event()

    @broker.task(task_name="contract")
    async def wait_for_release() -> None:
        started.set()
        await release.wait()

    stop = asyncio.Event()
    listening = asyncio.create_task(Receiver(broker, max_async_tasks=1, max_prefetch=0).listen(stop))
    await started.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert broker.asked == 1
    stop.set()
    release.set()
    await listening


async def test_errors_and_cancellation_arrive_as_results() -> None:
    broker = OneAtATime()

    @broker.task(task_name="contract")
    async def fail() -> None:
        raise asyncio.CancelledError

    receiver = RecordingReceiver(broker, max_async_tasks=1)
    receiver.results = []
    message = AckableMessage(data=broker.formatter.dumps(_message()).message, ack=lambda: None)
    await receiver.callback(message)
    assert [type(result.error) for result in receiver.results] == [asyncio.CancelledError]


@pytest.mark.filterwarnings("ignore")
async def test_poison_returns_without_running_anything() -> None:
    broker = OneAtATime()
    receiver = RecordingReceiver(broker, max_async_tasks=1)
    receiver.results = []
    for data in (b"garbage", broker.formatter.dumps(_message("unknown")).message):
        await receiver.callback(AckableMessage(data=data, ack=lambda: None))
    assert receiver.results == []


async def test_lane_label_reaches_kick() -> None:
    seen: list[dict[str, Any]] = []

    class Recorder(InMemoryBroker):
        async def kick(self, message: BrokerMessage) -> None:
            seen.append(message.labels)

    await AsyncKicker("anything", Recorder(), {"lane": "event"}).kiq()
    assert seen == [{"lane": "event"}]


async def test_startup_and_shutdown_of_the_base_class_only_run_hooks() -> None:
    """SafeJetStreamBroker 越过 taskiq-nats 直接调用它们。"""
    broker = SafeJetStreamBroker()
    seen: list[str] = []
    broker.add_event_handler(TaskiqEvents.CLIENT_STARTUP, lambda _: seen.append("started"))
    broker.add_event_handler(TaskiqEvents.CLIENT_SHUTDOWN, lambda _: seen.append("stopped"))
    await AsyncBroker.startup(broker)
    await AsyncBroker.shutdown(broker)
    assert seen == ["started", "stopped"]
    assert not broker.client.is_connected
