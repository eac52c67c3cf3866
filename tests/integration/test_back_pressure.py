"""队列满了：监听器等着，事件留在 EVENTS 里；`etl import` 等着，并说为什么；有了地方就接着做，什么也没丢。"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from nats.js.api import DiscardPolicy, StreamConfig

from bridge.events import DataImportCompleted, EventPublisher
from bridge.events.handlers import handlers_of
from bridge.events.listener import Listener
from bridge.events.streams import consumer_names
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.nats_names import EVENTS_STREAM, TASKS_STREAM
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.task_names import MATERIALIZE_DUE
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
from tests.the_three import graph

from .conftest import NatsServer


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[SafeJetStreamBroker]:
    settings = BridgeSettings(
        nats_url=nats_server.url, event_retry_delay_seconds=0.1, event_retry_delay_max_seconds=0.2
    )
    broker = SafeJetStreamBroker(settings)
    await broker.startup()
    yield broker
    await broker.shutdown()


async def limit_messages(broker: SafeJetStreamBroker, stream: str, count: int) -> None:
    config = (await broker.js.stream_info(stream)).config
    await broker.js.update_stream(config, max_msgs=count)


async def test_events_wait_in_their_stream_while_the_tasks_are_full(
    broker: SafeJetStreamBroker,
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bridge.events.handlers.get_engine", lambda: engine)
    monkeypatch.setattr("bridge.events.handlers.get_settings", lambda: etl_settings)
    await broker.ring(MATERIALIZE_DUE, "event")
    await limit_messages(broker, TASKS_STREAM, 1)
    stop = asyncio.Event()
    listening = asyncio.create_task(Listener(broker.settings, handlers=handlers_of(graph), ring=broker.ring).run(stop))
    async with asyncio.timeout(60), EventPublisher(broker.settings) as publisher:
        while EVENTS_STREAM not in [info.config.name for info in await broker.js.streams_info()]:
            await asyncio.sleep(0.05)
        for number in range(5):
            import_id = raw_data.add_import([{"order_id": str(number)}])
            await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
        while handled(engine) < 5:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        assert await unacknowledged(broker) == 5
        await limit_messages(broker, TASKS_STREAM, -1)
        while await unacknowledged(broker):
            await asyncio.sleep(0.05)
        assert (await broker.js.stream_info(TASKS_STREAM)).state.messages >= 2
    stop.set()
    await listening


def handled(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(import_events)) or 0


async def unacknowledged(broker: SafeJetStreamBroker) -> int:
    infos = [
        await broker.js.consumer_info(EVENTS_STREAM, name)
        for name in await consumer_names(broker.settings, broker.connection)
    ]
    return sum((info.num_ack_pending or 0) + (info.num_pending or 0) for info in infos)


async def test_import_waits_for_room_and_says_so(
    broker: SafeJetStreamBroker, etl_settings: EtlSettings, tmp_path: Path
) -> None:
    full = StreamConfig(name=EVENTS_STREAM, subjects=["events.>"], max_msgs=1, discard=DiscardPolicy.NEW)
    await broker.js.add_stream(full)
    await broker.connection.publish("events.other", b"old", message_id=str(uuid4()))
    file = tmp_path / "orders.csv"
    columns = "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at"
    file.write_text(f"{columns}\nA,店,张三,,completed,1,1,2026-01-05 09:00\n")
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_NATS_URL": broker.settings.nats_url,
    }
    command = [sys.executable, "-m", "bridge.cli.main", "import", str(file), "--create-shops"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = await asyncio.to_thread(process.stderr.readline)
        assert "waiting to announce it: the stream of events.data_import.completed is full" in said
        await limit_messages(broker, EVENTS_STREAM, 2)
        output, errors = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    stored = await broker.js.get_msg(EVENTS_STREAM, 2)
    assert output.strip() in (stored.data or b"").decode()
