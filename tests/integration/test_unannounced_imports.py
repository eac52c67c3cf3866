"""导入完成了、撤回了，事件没有来：过了宽限自己要进台账；早先的、还在路上的不碰。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import DiscardPolicy, RetentionPolicy, StreamConfig

from bridge.events import unannounced_imports
from bridge.events.handled_events import backlog_begins_at
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.streams import stream_state
from bridge.runs import reconciler
from bridge.settings import BridgeSettings
from etl_assets.core.backoff import Backoff
from etl_assets.core.settings import EtlSettings
from etl_assets.intake import unannounced_imports as services
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.intake.unannounced_imports import Walk, event_id_of, remember_changed, remember_unannounced
from etl_assets.intake.waiting_events import Patience, look_after_waiting_events
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

from .conftest import NatsServer
from .failing_imports import fails_on
from .listening import Bridge, open_bridge

PATIENCE = Patience(Backoff(1, 60), limit_seconds=3_600)


@pytest.fixture
def etl_settings(etl_settings: EtlSettings) -> EtlSettings:
    return etl_settings.model_copy(update={"unannounced_after_seconds": 1})


@pytest.fixture
async def bridge(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    monkeypatch.setattr(reconciler, "UNANNOUNCED_SECONDS", 0.1)
    async with open_bridge(
        BridgeSettings(nats_url=nats_server.url, event_ack_wait_seconds=2), engine, etl_settings, monkeypatch
    ) as made:
        await made.connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
        yield made


async def messages_in(bridge: Bridge, stream: str) -> int:
    state = await stream_state(bridge.connection, stream)
    return state.messages if state else 0


def seconds_ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def watched_since(engine: sa.Engine, settings: EtlSettings, seconds: float) -> None:
    """看着它们已经这么久了。"""
    remember_unannounced(engine, settings, handled_until=None)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE etl.import_watches SET watched_from = :since, watched_until = :since"),
            {"since": seconds_ago(seconds)},
        )


def handled(engine: sa.Engine) -> dict[UUID, UUID]:
    with engine.connect() as connection:
        return {
            row.import_id: row.event_id
            for row in connection.execute(sa.text("SELECT import_id, event_id FROM etl.import_events"))
        }


async def test_import_that_nobody_announced_is_taken_in_after_the_grace_period(
    bridge: Bridge, raw_data: RawData
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            await bridge.eventually(lambda: watches(bridge.engine))
            import_id = raw_data.add_import([{}], completed_at=datetime.now(UTC))
            await asyncio.sleep(0.5)
            assert bridge.handled() == {}
            await bridge.eventually(lambda: bridge.handled() == {import_id: event_id_of(import_id)})
            async with asyncio.timeout(10):  # 先提交，后敲门
                while not (tasks := await messages_in(bridge, "TASKS")):
                    await asyncio.sleep(0.02)
            assert tasks == 1
            late = await bridge.publish(import_id)
            await bridge.eventually(lambda: bridge.handled() == {import_id: late.event_id})
    (line,) = [
        line for line in logs if line["event"] == "imports that no event announced were found, they are taken in now"
    ]
    assert (line["imports"], line["first"], line["after_seconds"]) == (1, str(import_id), 1)


def watches(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql("SELECT count(*) FROM etl.import_watches").scalar())


async def test_imports_whose_events_queue_up_are_left_to_them(
    bridge: Bridge, raw_data: RawData, engine: sa.Engine
) -> None:
    """监听器停了一阵：流里排着队的事件不必再替它们宣布。"""
    async with bridge.listening():
        first = await bridge.publish(raw_data.add_import([{}], completed_at=datetime.now(UTC)))
        await bridge.eventually(lambda: bridge.handled() == {first.import_id: first.event_id})
    events = [
        first,
        *[await bridge.publish(raw_data.add_import([{}], completed_at=datetime.now(UTC))) for _ in range(20)],
    ]
    await asyncio.sleep(2)
    # 事件都还没处理时看一眼
    begins_at = await backlog_begins_at(bridge.connection, bridge.settings)
    assert begins_at is not None
    assert await asyncio.to_thread(remember_unannounced, engine, bridge.etl_settings, handled_until=begins_at) == []
    async with bridge.listening():
        await bridge.eventually(lambda: bridge.handled() == {event.import_id: event.event_id for event in events})
        assert await backlog_begins_at(bridge.connection, bridge.settings) is None


async def test_one_message_that_gets_stuck_does_not_stop_them(bridge: Bridge, raw_data: RawData) -> None:
    bridge.settings = bridge.settings.model_copy(update={"event_retry_delay_max_seconds": 0.5})
    async with bridge.listening():
        await bridge.eventually(lambda: watches(bridge.engine))
        config = (await bridge.connection.context.stream_info("EVENTS_DLQ")).config
        await bridge.connection.context.update_stream(config=config, max_bytes=1, discard=DiscardPolicy.NEW)
        await bridge.connection.publish(DATA_IMPORT_COMPLETED, b"garbage", message_id="garbage")
        import_id = raw_data.add_import([{}], completed_at=datetime.now(UTC))
        await bridge.eventually(lambda: import_id in bridge.handled(), seconds=10)


async def test_backlog_begins_with_the_first_event_that_is_not_handled(
    nats_server: NatsServer,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
    raw_data: RawData,
) -> None:
    """也在确认了就删的流上：已处理的最后一个不在了。"""
    async with open_bridge(BridgeSettings(nats_url=nats_server.url), engine, etl_settings, monkeypatch) as bridge:
        stream = StreamConfig(name="EVENTS", subjects=["events.>"], retention=RetentionPolicy.WORK_QUEUE)
        await bridge.connection.context.add_stream(stream)
        async with bridge.listening():
            done = await bridge.publish(raw_data.add_import([{}]))
            await bridge.eventually(lambda: done.import_id in bridge.handled())
        start = datetime.now(UTC)
        await bridge.publish(raw_data.add_import([{}]))
        begins_at = await backlog_begins_at(bridge.connection, bridge.settings)
        assert begins_at is not None
        assert begins_at > start - timedelta(seconds=1)


def test_what_was_completed_before_the_first_look_is_never_asked_for(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    for age in (2, 60, 3_000, 100_000):
        raw_data.add_import([{}], completed_at=seconds_ago(age))
    assert remember_unannounced(engine, etl_settings, handled_until=None) == []
    assert remember_unannounced(engine, etl_settings, handled_until=None) == []


def test_what_is_known_waiting_withdrawn_undated_or_still_in_time_is_left_alone(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    known = raw_data.add_import([{}], completed_at=seconds_ago(30))
    event = ImportEvent(known, uuid4(), sequence=1)
    waiting = uuid4()
    request_imports(engine, etl_settings, [event, ImportEvent(waiting, uuid4(), sequence=2, stored_at=seconds_ago(20))])
    raw_data.add_import([{}], import_id=waiting, completed_at=seconds_ago(10))
    raw_data.add_import([{}], completed_at=None, status="failed")
    raw_data.add_import([{}], completed_at=None)
    raw_data.add_import([{}], completed_at=seconds_ago(0))
    assert remember_unannounced(engine, etl_settings, handled_until=None) == []
    look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert handled(engine).keys() == {known, waiting}


def test_import_that_failed_and_left_nothing_is_looked_at_once_and_not_spoken_of(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    failed = raw_data.add_import([{}], completed_at=seconds_ago(30), status="failed")
    assert remember_unannounced(engine, etl_settings, handled_until=None) == []
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 0
    assert handled(engine).keys() == {failed}
    assert (days_asked_for(engine), waiting_imports(engine)) == (0, [])


def test_import_that_was_withdrawn_before_anybody_announced_it_is_taken_out(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """两个事件都丢了；别人的运行写下了它的订单。"""
    watched_since(engine, etl_settings, 7_200)
    quick = raw_data.add_import([{}], completed_at=seconds_ago(30))
    chain = Chain(engine, etl_settings)
    chain.run(date(2026, 1, 5))
    raw_data.set_status(quick, "failed")
    remember_unannounced(engine, etl_settings, handled_until=None)
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 1
    chain.run_due()
    chain.assert_converged()


def go_round(engine: sa.Engine, settings: EtlSettings, walk: Walk) -> list[UUID]:
    """走一圈。"""
    found = [*remember_changed(engine, settings, walk)]
    while not walk.is_at_start:
        found += remember_changed(engine, settings, walk)
    return found


@pytest.mark.parametrize("step", [1, 2, 5_000])
def test_withdrawal_whose_event_was_lost_is_found_when_it_is_seen_twice(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(services, "STEP", step)
    chain, walk = Chain(engine, etl_settings), Walk()
    imports = [raw_data.add_import([{"order_id": f"A-{number}"}], completed_at=seconds_ago(9)) for number in range(5)]
    for import_id in imports:
        chain.announce(import_id)
    chain.run_due()
    assert go_round(engine, etl_settings, walk) == []
    raw_data.set_status(imports[2], "failed")
    assert go_round(engine, etl_settings, walk) == []
    assert go_round(engine, etl_settings, walk) == [imports[2]]
    assert go_round(engine, etl_settings, walk) == []
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 1
    chain.run_due()
    chain.assert_converged()
    assert [go_round(engine, etl_settings, walk) for _ in range(2)] == [[], []]


def test_withdrawal_whose_event_comes_after_all_asks_once(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    walk = Walk()
    import_id = raw_data.add_import([{}], completed_at=seconds_ago(9))
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=1)])
    raw_data.set_status(import_id, "failed")
    go_round(engine, etl_settings, walk)
    assert go_round(engine, etl_settings, walk) == [import_id]
    withdrawal = ImportEvent(import_id, uuid4(), sequence=2)
    assert request_imports(engine, etl_settings, [withdrawal]) == ["requested"]
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 0
    assert handled(engine) == {import_id: withdrawal.event_id}


def test_import_that_is_completed_again_and_what_an_old_version_handled(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """旧版本没有记状态的不动：不知道它处理的是哪一个。"""
    walk = Walk()
    again, old = (raw_data.add_import([{}], completed_at=seconds_ago(9)) for _ in range(2))
    for import_id in (again, old):
        request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=1)])
        raw_data.set_status(import_id, "failed")
        request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4(), sequence=2)])
        raw_data.set_status(import_id, "completed")
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE etl.import_events SET import_status = NULL WHERE import_id = :old"), {"old": old}
        )
    go_round(engine, etl_settings, walk)
    assert go_round(engine, etl_settings, walk) == [again]
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 1


async def test_withdrawal_that_nobody_announced_is_taken_in(bridge: Bridge, raw_data: RawData) -> None:
    import_id = raw_data.add_import([{}], completed_at=datetime.now(UTC))
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            event = await bridge.publish(import_id)
            await bridge.eventually(lambda: bridge.handled() == {import_id: event.event_id})
            raw_data.set_status(import_id, "failed")
            await bridge.eventually(lambda: bridge.handled() == {import_id: event_id_of(import_id)})
    (line,) = [line for line in logs if line["event"].startswith("imports changed their status")]
    assert (line["imports"], line["first"]) == (1, str(import_id))


def days_asked_for(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        count: int = connection.exec_driver_sql("SELECT count(*) FROM etl.ledger").scalar_one()
        return count


def waiting_imports(engine: sa.Engine) -> list[UUID]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT import_id FROM etl.waiting_events")))


def test_import_that_commits_late_with_an_old_moment_is_found(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    remember_unannounced(engine, etl_settings, handled_until=None)
    late = raw_data.add_import([{}], completed_at=seconds_ago(3_000))
    assert remember_unannounced(engine, etl_settings, handled_until=None) == [late]
    assert remember_unannounced(engine, etl_settings, handled_until=None) == []


def test_many_are_taken_in_bite_by_bite_and_none_twice(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    wanted = [
        raw_data.add_import([{"order_id": f"A-{age}"}], completed_at=seconds_ago(age))
        for age in range(6_000, 5_000, -1)
    ]
    found: list[UUID] = []
    while bite := remember_unannounced(engine, etl_settings, handled_until=None):
        found += bite
    assert found == wanted
    look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert handled(engine) == {import_id: event_id_of(import_id) for import_id in wanted}


def test_import_that_cannot_be_taken_in_does_not_hold_up_the_others(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    bad, *good = [raw_data.add_import([{}], completed_at=seconds_ago(age)) for age in (30, 20, 10)]
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE etl.import_requests ADD CHECK (import_id <> '{bad}')")
    remember_unannounced(engine, etl_settings, handled_until=None)
    look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert handled(engine).keys() == set(good)


@pytest.mark.parametrize("sqlstate", ["23514", "53400"])
def test_import_that_cannot_be_taken_in_waits_and_is_never_forgotten(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, sqlstate: str
) -> None:
    watched_since(engine, etl_settings, 7_200)
    bad, good = (raw_data.add_import([{}], completed_at=seconds_ago(age)) for age in (3_597, 30))
    with fails_on(engine, bad, sqlstate):
        assert remember_unannounced(engine, etl_settings, handled_until=None) == [bad, good]
        assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 1
        assert remember_unannounced(engine, etl_settings, handled_until=None) == []
    assert handled(engine).keys() == {good}
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE etl.waiting_events SET look_at = now()")
        connection.exec_driver_sql("UPDATE etl.import_watches SET watched_until = now() + interval '1 day'")
    assert look_after_waiting_events(engine, etl_settings, PATIENCE).requested == 1
    assert handled(engine)[bad] == event_id_of(bad)


def test_event_that_comes_after_all_ends_the_waiting_of_its_import(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    watched_since(engine, etl_settings, 7_200)
    import_id = raw_data.add_import([{}], completed_at=seconds_ago(30))
    assert remember_unannounced(engine, etl_settings, handled_until=None) == [import_id]
    late = ImportEvent(import_id, uuid4(), sequence=7, stored_at=seconds_ago(0))
    assert request_imports(engine, etl_settings, [late]) == ["requested"]
    look = look_after_waiting_events(engine, etl_settings, PATIENCE)
    assert (look.requested, look.waiting) == (0, 0)
    assert handled(engine) == {import_id: late.event_id}


async def test_imports_that_cannot_be_taken_in_neither_spin_nor_ring(
    bridge: Bridge, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "BITE", 2)
    monkeypatch.setattr(unannounced_imports, "BITE", 2)
    monkeypatch.setattr(services, "_SILENT", services._SILENT.limit(2))
    watched_since(engine, bridge.etl_settings, 7_200)
    looks: list[object] = []
    asked = unannounced_imports.remember_unannounced
    monkeypatch.setattr(
        unannounced_imports, "remember_unannounced", lambda *of, **given: looks.append(None) or asked(*of, **given)
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE etl.import_requests ADD CHECK (false) NOT VALID")
    for age in (30, 20, 10):
        raw_data.add_import([{}], completed_at=seconds_ago(age))
    async with bridge.listening():
        await asyncio.sleep(1)
        tasks = await stream_state(bridge.connection, "TASKS")
    assert len(looks) < 15
    assert bridge.waiting() == 3
    assert tasks is not None
    assert tasks.messages == 0


def test_only_one_listener_looks_at_a_time(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    watched_since(engine, etl_settings, 7_200)
    raw_data.add_import([{}], completed_at=seconds_ago(30))
    with engine.begin() as other:
        other.exec_driver_sql("SELECT * FROM etl.import_watches FOR UPDATE")
        assert remember_unannounced(engine, etl_settings, handled_until=None) == []
    assert len(remember_unannounced(engine, etl_settings, handled_until=None)) == 1


def test_looking_does_not_read_all_imports(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO import_tasks (import_id, status, completed_at)"
            " SELECT gen_random_uuid(), 'completed', now() - n * interval '1 minute' - interval '2 hours'"
            " FROM generate_series(1, 50000) n"
        )
    watched_since(engine, etl_settings, 3_600)
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE import_tasks")
    before = rows_read(engine)
    remember_unannounced(engine, etl_settings, handled_until=None)
    assert rows_read(engine) - before < 1_000


def rows_read(engine: sa.Engine) -> int:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        statement = (
            "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables WHERE relname = 'import_tasks'"
        )
        count: int = connection.exec_driver_sql(statement).scalar_one()
        return count


async def test_without_an_index_the_table_is_read_once_a_minute(
    bridge: Bridge, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    monkeypatch.setattr(unannounced_imports, "remember_unannounced", lambda *_, **__: looks.append(None) or [])
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_import_tasks_completed_at")
    async with bridge.listening():
        await bridge.eventually(lambda: looks)
        await asyncio.sleep(1)
    assert len(looks) == 1
