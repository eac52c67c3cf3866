"""etl wait：流里还有它没处理的事件时，台账说做完了也不算。"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from nats.js.api import DiscardPolicy

from bridge.cli.backfill import backfill_command
from bridge.cli.events import publish_command, wait_command
from bridge.cli.imports import imports_command
from bridge.events.streams import consumer_name, ensure_event_streams, events_stream
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import consumer_info, ensure_stream
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

from .commands import use_in_commands
from .conftest import NatsServer
from .listening import Bridge, open_bridge

Wait = Callable[..., Any]


@pytest.fixture
async def bridge(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    settings = BridgeSettings(nats_url=nats_server.url, connect_timeout_seconds=1)
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as made:
        yield made


@pytest.fixture
def wait(bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wait:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, engine=bridge.engine, settings=bridge.etl_settings, bridge_settings=bridge.settings)

    async def waited(import_id: UUID, seconds: float) -> Result:
        arguments = ["--import-id", str(import_id), "--timeout", str(seconds)]
        return await asyncio.to_thread(CliRunner().invoke, wait_command, arguments)

    return waited


async def finished_import(bridge: Bridge, raw_data: RawData) -> UUID:
    import_id = raw_data.add_import([{}])
    async with bridge.listening():
        await bridge.publish(import_id)
        await bridge.eventually(lambda: import_id in bridge.handled())
    await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
    return import_id


async def test_second_event_of_an_import_is_waited_for_although_the_first_is_done(
    bridge: Bridge, wait: Wait, raw_data: RawData
) -> None:
    import_id = await finished_import(bridge, raw_data)
    assert (await wait(import_id, 20)).exit_code == 0
    await bridge.publish(import_id)
    result = await wait(import_id, 0.5)
    assert result.exit_code == 2, result.output
    assert "its newest event has not been handled yet" in result.stderr
    waiting = asyncio.create_task(wait(import_id, 30))
    async with bridge.listening():
        await bridge.eventually(lambda: Chain(bridge.engine, bridge.etl_settings).due_days())
        assert not waiting.done()
        await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
        assert (await waiting).exit_code == 0


async def test_without_nats_the_ledger_decides_and_it_says_so(
    bridge: Bridge, wait: Wait, raw_data: RawData, nats_server: NatsServer
) -> None:
    import_id = await finished_import(bridge, raw_data)
    nats_server.kill()
    start = time.monotonic()
    result = await wait(import_id, 30)
    assert result.exit_code == 0
    assert (
        result.stderr.count("warning: cannot see whether events are still to be handled, going by the ledger alone")
        == 1
    )
    assert time.monotonic() - start < 10


async def test_event_that_waits_for_its_import_is_not_handled_yet(
    bridge: Bridge, wait: Wait, raw_data: RawData
) -> None:
    import_id = raw_data.add_import([{}], status="pending")
    async with bridge.listening():
        await bridge.publish(import_id)
        await bridge.eventually(lambda: bridge.waiting() == 1)
        result = await wait(import_id, 0.3)
    assert (result.exit_code, "its event has not been handled yet" in result.stderr) == (2, True)


async def test_message_that_is_stuck_in_the_stream_is_not_waited_for(
    bridge: Bridge, wait: Wait, raw_data: RawData
) -> None:
    """判过了，只是死信流没有地方给它。"""
    bridge.settings = bridge.settings.model_copy(update={"event_retry_delay_max_seconds": 0.5})
    import_id = await finished_import(bridge, raw_data)
    async with bridge.listening():
        config = (await bridge.connection.context.stream_info("EVENTS_DLQ")).config
        await bridge.connection.context.update_stream(config=config, max_bytes=1, discard=DiscardPolicy.NEW)
        await bridge.connection.publish(DATA_IMPORT_COMPLETED, b"garbage", message_id="garbage")
        result = await wait(import_id, 10)
        assert result.exit_code == 0, result.output
        # 它后面处理了的也算
        await bridge.publish(import_id)
        again = asyncio.create_task(wait(import_id, 20))
        await bridge.eventually(lambda: Chain(bridge.engine, bridge.etl_settings).due_days())
        await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
        assert (await again).exit_code == 0
        await bridge.connection.context.update_stream(config=config, max_bytes=-1)
        await bridge.letters(1)
        consumer = await consumer_info(
            bridge.connection, "EVENTS", consumer_name(bridge.settings, DATA_IMPORT_COMPLETED)
        )
    assert consumer is not None
    # 了结了的不再数作重投的：不然它会替后来的新事件顶数
    assert (consumer.num_ack_pending, consumer.num_redelivered) == (0, 0)


async def test_event_of_the_import_that_is_stuck_itself_is_waited_for(
    bridge: Bridge, wait: Wait, raw_data: RawData
) -> None:
    bridge.settings = bridge.settings.model_copy(
        update={"event_retry_delay_max_seconds": 0.3, "event_retry_delay_seconds": 0.1}
    )
    import_id = await finished_import(bridge, raw_data)
    with bridge.engine.begin() as connection:
        connection.exec_driver_sql(
            """
            CREATE FUNCTION etl.fail() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'index is damaged' USING ERRCODE = 'XX001'; END $$;
            CREATE TRIGGER fail BEFORE INSERT ON etl.import_requests FOR EACH ROW EXECUTE FUNCTION etl.fail();
            """
        )
    async with bridge.listening():
        await bridge.publish(import_id)
        assert (await wait(import_id, 3)).exit_code == 2
        with bridge.engine.begin() as connection:
            connection.exec_driver_sql("DROP FUNCTION etl.fail CASCADE")
        waiting = asyncio.create_task(wait(import_id, 20))
        await bridge.eventually(lambda: Chain(bridge.engine, bridge.etl_settings).due_days())
        await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
        assert (await waiting).exit_code == 0


async def test_waiting_keeps_one_connection_and_asks_rarely_after_a_while(
    bridge: Bridge, wait: Wait, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.cli.events._EAGER_SECONDS", 0.5)
    import_id = await finished_import(bridge, raw_data)
    await bridge.publish(import_id)
    asked: list[str] = []
    ask = JetStreamConnection._ask_once

    async def counted(self: JetStreamConnection, what: str, content: Any = None) -> dict[str, Any]:
        asked.append(what)
        return await ask(self, what, content)

    monkeypatch.setattr(JetStreamConnection, "_ask_once", counted)
    assert (await wait(import_id, 2.5)).exit_code == 2
    assert asked.count("INFO") == 1
    assert sum(what.startswith("CONSUMER.INFO") for what in asked) <= 16


async def test_import_that_does_not_exist_is_said_at_once(wait: Wait) -> None:
    import_id = uuid4()
    start = time.monotonic()
    result = await wait(import_id, 30)
    assert (result.exit_code, str(result.exception)) == (
        1,
        f"there is no import {import_id}, and no event of it: `etl imports` lists them",
    )
    assert time.monotonic() - start < 10


async def test_import_whose_event_came_first_is_waited_for(bridge: Bridge, wait: Wait, raw_data: RawData) -> None:
    import_id = uuid4()
    await ensure_stream(bridge.connection, events_stream(bridge.settings))
    await bridge.publish(import_id)
    assert (await wait(import_id, 0.3)).exit_code == 2
    async with bridge.listening():
        await bridge.eventually(lambda: bridge.waiting() == 1)
        waiting = asyncio.create_task(wait(import_id, 30))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        raw_data.add_import([{}], import_id=import_id)
        await bridge.eventually(lambda: import_id in bridge.handled())
        await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
        assert (await waiting).exit_code == 0


async def test_withdrawn_import_is_called_withdrawn(bridge: Bridge, wait: Wait, raw_data: RawData) -> None:
    import_id = await finished_import(bridge, raw_data)
    never_seen = raw_data.add_import([{}])
    failed = raw_data.add_import([{}], status="failed", completed_at=None)
    for withdrawn in (import_id, never_seen):
        raw_data.set_status(withdrawn, "failed")
        result = await wait(withdrawn, 10)
        assert (result.exit_code, result.stderr) == (0, f"import {withdrawn} is withdrawn\n")
    said = str((await wait(failed, 10)).exception)
    assert said == f"import {failed} failed in the application that made it: nothing of it is in the tables"
    listed = json.loads((await asyncio.to_thread(CliRunner().invoke, imports_command, ["--format", "json"])).stdout)
    assert {row["import_id"]: row["status"] for row in listed} == {
        str(import_id): "withdrawn",
        str(never_seen): "withdrawn",
        str(failed): "failed",
    }


@pytest.mark.usefixtures("wait")
async def test_event_that_nobody_reads_is_stored_and_said(bridge: Bridge) -> None:
    def publish(subject: str) -> Result:
        content = json.dumps({"status": "completed", "import_id": str(uuid4())})
        return CliRunner().invoke(publish_command, [subject, content])

    await ensure_stream(bridge.connection, events_stream(bridge.settings))
    result = await asyncio.to_thread(publish, "events.data_import.complete")
    assert (result.exit_code, "stored in EVENTS as sequence 1" in result.stdout) == (0, True)
    assert "warning: nobody reads events.data_import.complete" in result.stderr
    await ensure_event_streams(bridge.connection, bridge.settings, [DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED])
    result = await asyncio.to_thread(publish, "events.data_import.complete")
    assert "nobody reads events.data_import.complete; read are events.data_import.completed, " in result.stderr
    assert (await asyncio.to_thread(publish, DATA_IMPORT_COMPLETED)).stderr == ""


@pytest.mark.usefixtures("wait")
async def test_backfill_ends_with_a_line(bridge: Bridge, raw_data: RawData) -> None:
    await finished_import(bridge, raw_data)
    arguments = ["--from", "2026-01-05", "--to", "2026-01-05", "--timeout", "20"]
    running = asyncio.create_task(asyncio.to_thread(CliRunner().invoke, backfill_command, arguments))
    await bridge.eventually(lambda: Chain(bridge.engine, bridge.etl_settings).due_days())
    await asyncio.to_thread(Chain(bridge.engine, bridge.etl_settings).run_due)
    result = await running
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(r"2026-01-05 is materialized again: all assets, [0-9.]+ s\n", result.stdout)
