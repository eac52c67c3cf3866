"""网页里的门铃：NATS 的口令换了，旧的连接再也连不上，下一次敲用新的口令另连。"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator

import pytest

from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import stream_state
from bridge.queue.doorbell import Doorbell
from bridge.settings import BridgeSettings

from .conftest import NatsServer


@pytest.fixture
def doorbell(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doorbell]:
    monkeypatch.setenv("ETL_NATS_URL", nats_server.url)
    bell = Doorbell()
    yield bell
    # 它没有结束的一天；测试有
    loop = bell._running_loop()
    asyncio.run_coroutine_threadsafe(shut_down(bell), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    while loop.is_running():
        time.sleep(0.01)
    loop.close()
    gc.collect()


async def shut_down(bell: Doorbell) -> None:
    if bell._closing is not None:
        await bell._closing
    if bell._broker is not None:
        await bell._broker.shutdown()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


# nats-py 不关被拒绝的那些重连的套接字
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_doorbell_rings_again_after_the_password_was_changed(
    doorbell: Doorbell, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    doorbell.ring("run-1", "interactive")
    assert waiting_tasks(nats_server) == 1
    nats_server.kill()
    nats_server.password = "another"
    nats_server.start()
    doorbell.ring("run-lost", "interactive")  # 旧的口令：敲不响不算错，运行留着
    monkeypatch.setenv("ETL_NATS_URL", nats_server.url)
    doorbell.ring("run-2", "interactive")
    assert waiting_tasks(nats_server) == 2


def waiting_tasks(nats_server: NatsServer) -> int:
    async def ask() -> int:
        connection = JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test")
        await connection.open()
        state = await stream_state(connection, "TASKS")
        await connection.close()
        return state.messages if state else 0

    return asyncio.run(ask())
