"""事件比导入早：记在台账里，不挡别的事件；导入来了就处理，限期到了进死信。"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import DiscardPolicy, StreamConfig

from bridge.events import due_bell
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.stored_messages import delete_message
from bridge.jetstream.streams import stream_state
from bridge.runs import reconciler
from bridge.settings import BridgeSettings
from etl_assets.core.backoff import Backoff
from etl_assets.core.database_sync import transact
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.intake.imports import NO_SEQUENCE, ImportEvent, remember_waiting, request_imports
from etl_assets.intake.waiting_events import Patience, forget, look_after_waiting_events
from etl_assets.ledger.locks import lock_imports
from etl_assets.services.raw_rows import reject_rows_without_partition
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .failing_imports import fails_on
from .listening import Bridge, open_bridge

PATIENCE = Patience(Backoff(1, 60), limit_seconds=3_600)


@pytest.fixture
async def bridge(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    monkeypatch.setattr(reconciler, "WAITING_SECONDS", 0.05, raising=False)
    settings = BridgeSettings(nats_url=nats_server.url, event_retry_delay_seconds=0.05, event_ack_wait_seconds=2)
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as made:
        await made.connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
        yield made


def with_limit(bridge: Bridge, seconds: int) -> None:
    bridge.settings = bridge.settings.model_copy(update={"event_retry_seconds": seconds})


async def test_flood_of_waiting_events_neither_stops_the_others_nor_floods_the_log(
    bridge: Bridge, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.events.streams.MAX_ACK_PENDING", 100)
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            await bridge.publish_missing(400)
            good = await bridge.publish(raw_data.add_import([{}]))
            await bridge.eventually(lambda: good.import_id in bridge.handled())
            await bridge.eventually(lambda: bridge.waiting() == 400)
            await asyncio.sleep(1)
    lines = [line for line in logs if line["event"] not in ("ready", "nats disconnected", "event handled")]
    assert len(lines) < 10, lines
    (said,) = [line for line in lines if line["event"] == "events wait for their imports"]
    assert 0 < said["events"] <= 400


@pytest.mark.parametrize("before", [None, "pending"])
async def test_event_is_taken_in_once_its_import_is_completed(
    bridge: Bridge, raw_data: RawData, engine: sa.Engine, before: str | None
) -> None:
    import_id = uuid4()
    if before:
        raw_data.add_import([{}], import_id=import_id, status=before)
    async with bridge.listening():
        event = await bridge.publish(import_id, allow_deletes=True)
        await bridge.eventually(lambda: bridge.waiting() == 1)
        if before:
            raw_data.set_status(import_id, "completed")
        else:
            raw_data.add_import([{}], import_id=import_id)
        await bridge.eventually(lambda: bridge.handled().get(import_id) == event.event_id)
        await bridge.eventually(lambda: not bridge.waiting())
        tasks = await stream_state(bridge.connection, "TASKS")
    with engine.connect() as reading:
        due = reading.execute(
            sa.select(ledger.c.requested, ledger.c.allow_deletes).where(ledger.c.asset == "orders")
        ).one()
    assert tuple(due) == (1, True)
    assert tasks is not None
    assert tasks.messages == 1
    assert await bridge.letters() == []


async def test_event_waits_through_a_restart_of_the_listener(bridge: Bridge, raw_data: RawData) -> None:
    async with bridge.listening():
        event = await bridge.publish(uuid4())
        await bridge.eventually(lambda: bridge.waiting() == 1)
    raw_data.add_import([{}], import_id=event.import_id)
    async with bridge.listening():
        await bridge.eventually(lambda: bridge.handled() == {event.import_id: event.event_id})


async def test_event_whose_import_never_comes_is_dead_lettered_as_it_was(bridge: Bridge) -> None:
    with_limit(bridge, 1)
    async with bridge.listening():
        event = await bridge.publish(uuid4(), note="kept")
        (letter,) = await bridge.letters(1)
        await bridge.eventually(lambda: not bridge.waiting())
    headers = letter.headers or {}
    assert json.loads(letter.data or b"")["note"] == "kept"
    assert letter.subject == "events_dlq.data_import.completed"
    assert (
        headers["Etl-Reason"] == f"import {event.import_id} is not in import_tasks; given up 1 s after it was published"
    )
    assert (headers["Etl-Subject"], headers["Etl-Stream"], headers["Etl-Sequence"]) == (
        DATA_IMPORT_COMPLETED,
        "EVENTS",
        "1",
    )
    assert int(headers["Etl-Attempts"]) >= 2


@pytest.mark.parametrize("lost", ["deleted", "another event has its sequence"])
async def test_letter_is_made_from_the_ledger_when_the_stream_has_lost_the_event(
    bridge: Bridge, raw_data: RawData, lost: str
) -> None:
    with_limit(bridge, 1)
    async with bridge.listening():
        event = await bridge.publish(raw_data.add_import([{}], status="pending"), allow_deletes=True)
        await bridge.eventually(lambda: bridge.waiting() == 1)
        if lost == "deleted":
            await delete_message(bridge.connection, "EVENTS", 1)
        else:
            await bridge.connection.publish("events.other", b"{}", message_id="other")
            with bridge.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE etl.waiting_events SET stream_sequence = 2")
        (letter,) = await bridge.letters(1)
    content = json.loads(letter.data or b"")
    assert (content["event_id"], content["import_id"]) == (str(event.event_id), str(event.import_id))
    assert content["allow_deletes"] is True
    assert (letter.headers or {})["Etl-Reason"].startswith(
        f"import {event.import_id} is not completed in import_tasks; given up 1 s"
    )


async def test_event_stays_in_the_ledger_while_the_dead_letters_are_full(bridge: Bridge) -> None:
    with_limit(bridge, 1)
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            await bridge.publish(uuid4())
            await bridge.eventually(lambda: bridge.waiting() == 1)
            config = (await bridge.connection.context.stream_info("EVENTS_DLQ")).config
            await bridge.connection.context.update_stream(config=config, max_bytes=1, discard=DiscardPolicy.NEW)
            await asyncio.sleep(2)
            assert (bridge.waiting(), await bridge.letters()) == (1, [])
            await bridge.connection.context.update_stream(config=config, max_bytes=-1)
            await bridge.letters(1)
            await bridge.eventually(lambda: not bridge.waiting())
    (said,) = [line for line in logs if line["event"].startswith("the dead letters are full")]
    assert "`etl dlq list`" in said["remedy"]
    assert not [line for line in logs if line["event"] == "cannot reconcile now"]


async def test_deleted_stream_of_dead_letters_is_made_again(bridge: Bridge) -> None:
    with_limit(bridge, 1)
    async with bridge.listening():
        await bridge.publish(uuid4())
        await bridge.eventually(lambda: bridge.waiting() == 1)
        await bridge.connection.context.delete_stream("EVENTS_DLQ")
        await bridge.letters(1)


async def test_import_that_nobody_announced_and_that_vanished_ends_as_a_letter(bridge: Bridge) -> None:
    """流里没有它的原文可找；一眼看到的几个记的是同一时刻，也各有一封。"""
    stored_at = datetime.now(UTC) - timedelta(days=9)
    events = [ImportEvent(uuid4(), uuid4(), sequence=NO_SEQUENCE, stored_at=stored_at) for _ in range(3)]
    async with bridge.listening():
        with bridge.engine.begin() as connection:
            remember_waiting(connection, "public", events)
        letters = await bridge.letters(3)
    assert {json.loads(letter.data or b"")["import_id"] for letter in letters} == {
        str(event.import_id) for event in events
    }


async def test_waiting_events_ring_no_more_than_others_when_nobody_takes_the_tasks(
    bridge: Bridge, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(due_bell, "CROWD", 3)
    async with bridge.listening():
        for _ in range(15):
            event = await bridge.publish(uuid4())
            await bridge.eventually(lambda: bridge.waiting() == 1)
            raw_data.add_import([{}], import_id=event.import_id)
            await bridge.eventually(lambda: not bridge.waiting())
        tasks = await stream_state(bridge.connection, "TASKS")
    assert tasks is not None
    assert tasks.messages < 10


async def test_two_listeners_share_the_waiting_events(bridge: Bridge, raw_data: RawData, engine: sa.Engine) -> None:
    imports = [uuid4() for _ in range(200)]
    async with bridge.listening(), bridge.listening():
        for import_id in imports:
            await bridge.publish(import_id)
        await bridge.eventually(lambda: bridge.waiting() == len(imports))
        for import_id in imports:
            raw_data.add_import([{}], import_id=import_id)
        await bridge.eventually(lambda: not bridge.waiting())
    assert bridge.handled().keys() == set(imports)
    with engine.connect() as reading:
        # 一次要求一批：没有哪个事件要求两次
        assert reading.scalar(sa.select(ledger.c.requested).where(ledger.c.asset == "orders")) <= len(imports)
    assert await bridge.letters() == []


def test_same_event_twice_waits_once_and_is_taken_in_once(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    stored_at = datetime.now(UTC)
    event = ImportEvent(uuid4(), uuid4(), sequence=1, stored_at=stored_at)
    later = ImportEvent(event.import_id, uuid4(), sequence=2, stored_at=stored_at)
    assert request_imports(engine, etl_settings, [event, event, later]) == ["missing"] * 3
    assert request_imports(engine, etl_settings, [event]) == ["missing"]
    raw_data.add_import([{}], import_id=event.import_id)
    look = look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert (look.requested, look.waiting, look.more) == (2, 0, False)
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 0


def test_event_that_is_published_again_waits_from_then_on(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    old = ImportEvent(uuid4(), uuid4(), sequence=1, stored_at=datetime.now(UTC) - timedelta(days=1))
    request_imports(engine, etl_settings, [old])
    (overdue,) = look_after_waiting_events(engine, etl_settings, PATIENCE).overdue
    request_imports(engine, etl_settings, [old])
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).waiting == 0
    request_imports(engine, etl_settings, [replace(old, sequence=2, stored_at=datetime.now(UTC), allow_deletes=True)])
    transact(engine, forget, "public", [overdue])  # 它的死信刚存下，又被放了回来
    look = look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert (look.waiting, look.overdue) == (1, [])


def test_looks_grow_rarer_up_to_the_deadline(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    stored_at = datetime.now(UTC) - timedelta(seconds=90)
    request_imports(engine, etl_settings, [ImportEvent(uuid4(), uuid4(), sequence=1, stored_at=stored_at)])
    pauses = []
    for _ in range(6):
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE etl.waiting_events SET look_at = now()")
        look_after_waiting_events(engine, etl_settings, Patience(Backoff(1, 60), 100))
        with engine.begin() as connection:
            pause = connection.exec_driver_sql(
                "SELECT extract(epoch FROM look_at - now()) FROM etl.waiting_events"
            ).scalar_one()
            pauses.append(round(pause))
    assert pauses == [1, 2, 4, 8, 10, 10]


def test_event_that_cannot_be_taken_in_does_not_hold_up_the_others(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=1)
    events = [ImportEvent(uuid4(), uuid4(), sequence=number, stored_at=long_ago) for number in range(3)]
    request_imports(engine, etl_settings, events)
    for event in events:
        raw_data.add_import([{}], import_id=event.import_id)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE etl.import_requests ADD CHECK (import_id <> '{events[1].import_id}')")
    look = look_after_waiting_events(engine, etl_settings, PATIENCE)
    # 导入在，错不在事件：不进死信
    assert (look.requested, look.overdue) == (2, [])
    with engine.connect() as connection:
        left = connection.exec_driver_sql("SELECT import_id FROM etl.waiting_events").scalars().all()
    assert left == [events[1].import_id]


@pytest.mark.parametrize("sqlstate", ["53400", "XX001", "55P03"])
def test_error_of_ours_that_one_event_meets_does_not_hold_up_the_others(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, sqlstate: str
) -> None:
    """一个上限、坏了的一页、等不到的锁：它自己越来越久地再试，没有留在到点的里面。"""
    events = [ImportEvent(uuid4(), uuid4(), sequence=number, stored_at=datetime.now(UTC)) for number in range(6)]
    request_imports(engine, etl_settings, events)
    for event in events:
        raw_data.add_import([{}], import_id=event.import_id)
    with fails_on(engine, events[1].import_id, sqlstate):
        assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 5
    with engine.connect() as connection:
        left = connection.exec_driver_sql("SELECT import_id, looks, look_at > now() FROM etl.waiting_events").all()
    assert [tuple(row) for row in left] == [(events[1].import_id, 1, True)]


def test_any_error_of_one_event_does_not_hold_up_the_others(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """不是数据库说的错，比方说我们自己的毛病。"""
    events = [ImportEvent(uuid4(), uuid4(), sequence=number, stored_at=datetime.now(UTC)) for number in range(6)]
    request_imports(engine, etl_settings, events)
    for event in events:
        raw_data.add_import([{}], import_id=event.import_id)

    def judge(connection: sa.Connection, settings: EtlSettings, import_ids: list[UUID]) -> int:
        if events[1].import_id in import_ids:
            raise ZeroDivisionError
        return reject_rows_without_partition(connection, settings, import_ids)

    monkeypatch.setattr("etl_assets.services.raw_rows.reject_rows_without_partition", judge)
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 5


def test_when_all_fail_the_first_few_are_enough_for_one_look(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    events = [ImportEvent(uuid4(), uuid4(), sequence=number, stored_at=datetime.now(UTC)) for number in range(20)]
    request_imports(engine, etl_settings, events)
    for event in events:
        raw_data.add_import([{}], import_id=event.import_id)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE etl.import_requests ADD CHECK (false)")
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert len(statements) < 60, len(statements)


def test_looking_and_redelivery_do_not_deadlock(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """看的那一边不能先锁着等待的行再要导入的锁：收事件的拿着导入的锁来碰这些行。"""
    (early, other) = (ImportEvent(uuid4(), uuid4(), sequence=number, stored_at=datetime.now(UTC)) for number in (1, 2))
    request_imports(engine, etl_settings, [early, other])
    raw_data.add_import([{}], import_id=early.import_id)
    with engine.connect() as intake, ThreadPoolExecutor() as pool:
        lock_imports(intake, "public", [early.import_id])
        looking = pool.submit(look_after_waiting_events, engine, etl_settings, PATIENCE)
        time.sleep(0.5)
        intake.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        intake.exec_driver_sql("UPDATE etl.waiting_events SET looks = looks")
        intake.commit()
        assert looking.result(10).requested == 1


def test_withdrawn_import_that_never_reached_the_tables_ends_the_waiting(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    event = ImportEvent(raw_data.add_import([{}], status="pending"), uuid4(), sequence=1, stored_at=datetime.now(UTC))
    request_imports(engine, etl_settings, [event])
    raw_data.set_status(event.import_id, "failed")
    look = look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert (look.requested, look.overdue, look.waiting) == (0, [], 0)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM etl.waiting_events").scalar() == 0


def test_looking_is_quick_among_many_imports_and_many_waiting_events(
    engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """到点的一批只按主键找它们的导入：不读全部的导入，也不读全部在等的。"""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO import_tasks (import_id, status) SELECT gen_random_uuid(), 'completed' FROM generate_series(1, 20000)"
        )
        connection.exec_driver_sql(
            "INSERT INTO etl.waiting_events (target, import_id, event_id, stream_sequence, stored_at)"
            " SELECT 'public', gen_random_uuid(), gen_random_uuid(), n, now() FROM generate_series(1, 20000) n"
        )
    start = time.monotonic()
    looks = 0
    while look_after_waiting_events(engine, etl_settings, Patience(Backoff(30, 60), 3_600)).more:
        looks += 1
    assert looks == 20
    assert time.monotonic() - start < 10
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(import_tasks)) == 20_000
