"""etl replay：台账比流旧时，缺的由流里的事件补上；做完了的不再要求。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from nats.js.api import StreamConfig

from bridge.cli.replay import replay_command
from bridge.events import DataImportCompleted, EtlCompleted, Event, handlers
from bridge.events.event_task_utils import Decision, Done, ReceivedEvent, event_task_handler
from bridge.events.listener import Listener
from bridge.events.streams import consumer_name
from bridge.events.subjects import DATA_IMPORT_COMPLETED, LEADS_ETL_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.jetstream import stored_messages
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import stored_message
from bridge.jetstream.streams import consumer_info, stream_state
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import etl, import_events, import_requests, ledger, order_index
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.ledger.outbox import installation_id
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.the_three import graph

from .commands import use_in_commands
from .conftest import NatsServer

Replay = Callable[..., Awaitable[dict[str, Any]]]
Run = Callable[..., Awaitable[Result]]


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, 0, tzinfo=UTC)


class World:
    """一个数据库、一个流：发布事件，让监听器处理完，像工人那样做到没有一天到期。"""

    def __init__(self, settings: BridgeSettings, chain: Chain) -> None:
        self.settings = settings
        self.chain = chain
        self.connection = JetStreamConnection(settings, name="test")

    async def publish(self, event: Event, subject: str = DATA_IMPORT_COMPLETED) -> int:
        data = event.model_dump_json(exclude_none=True).encode()
        return (await self.connection.publish(subject, data, message_id=str(event.event_id))).seq

    async def announce(self, *import_ids: UUID, status: str = "completed") -> list[int]:
        return [await self.publish(DataImportCompleted(import_id=import_id, status=status)) for import_id in import_ids]

    async def listen(self) -> None:
        """监听器处理完流里的一切。"""

        async def ring(*_: str) -> None:
            return

        stop = asyncio.Event()
        running = asyncio.create_task(
            Listener(self.settings, handlers=handlers.handlers_of(graph), ring=ring).run(stop)
        )
        async with asyncio.timeout(30):
            while await unhandled(self.connection) != 0:
                await asyncio.sleep(0.02)
        stop.set()
        await running

    async def work(self) -> None:
        await asyncio.to_thread(self.chain.run_due)


async def unhandled(connection: JetStreamConnection) -> int | None:
    """还没确认的；监听器还没把消费者都建好就是 None。"""
    names = [consumer_name(BridgeSettings(), handler.subject) for handler in handlers.handlers_of(graph)]
    infos = [info for name in names if (info := await consumer_info(connection, "EVENTS", name))]
    return (
        sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)
        if len(infos) == len(names)
        else None
    )


@pytest.fixture
async def world(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    for module in ("bridge.events.handlers", "bridge.operations.replay"):
        monkeypatch.setattr(f"{module}.get_engine", lambda: engine)
        monkeypatch.setattr(f"{module}.get_settings", lambda: etl_settings)
    made = World(BridgeSettings(nats_url=nats_server.url), Chain(engine, etl_settings))
    await made.connection.open()
    await made.connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    yield made
    await made.connection.close()


@pytest.fixture
def run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`await run("--seq", "1")`：像在终端里那样。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, bridge_settings=world.settings)
    return lambda *arguments: asyncio.to_thread(CliRunner().invoke, replay_command, arguments)


@pytest.fixture
def replay(run: Run) -> Replay:
    """成功的一次，答的是 --json。"""

    async def replayed(*arguments: str) -> dict[str, Any]:
        result = await run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        content: dict[str, Any] = json.loads(result.stdout)
        return content

    return replayed


def verdicts(report: dict[str, Any]) -> dict[str, int]:
    names = ("requested", "skipped", "ignored", "not_completed", "invalid")
    assert report["events"] == sum(report[name] for name in names)
    return {name: report[name] for name in names if report[name]}


async def doorbells(world: World) -> int:
    state = await stream_state(world.connection, "TASKS")
    return state.messages if state else 0


def everything(engine: sa.Engine) -> dict[str, list[Any]]:
    """schema etl 里的一切。"""
    with engine.connect() as connection:
        return {name: sorted(map(repr, connection.execute(sa.select(table)))) for name, table in etl.tables.items()}


async def test_restored_backup_catches_up_from_the_stream(
    world: World, replay: Replay, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etl 的表与结果表回到第一次导入之后的样子，流里有三次：重放之后与参照一样，台账也一样。"""
    monkeypatch.setattr(stored_messages, "_BATCH_SIZE", 2)
    first = raw_data.add_import([{"order_id": f"A-{day}", "ordered_at": at(day)} for day in (5, 6)])
    await world.announce(first)
    await world.listen()
    await world.work()
    second = raw_data.add_import(
        [{"order_id": f"B-{day}", "ordered_at": at(day)} for day in (7, 8, 9)], completed_at=at(20)
    )
    third = raw_data.add_import([{"order_id": "B-9", "ordered_at": at(12), "amount": "7.00"}], completed_at=at(21))
    await world.announce(second, third)
    await world.listen()
    await world.work()
    restored = ledger.c.day >= date(2026, 1, 7)
    tables = target_tables("public")
    for statement in (
        sa.delete(ledger).where(restored),
        sa.delete(import_requests).where(import_requests.c.import_id != first),
        sa.delete(import_events).where(import_events.c.import_id != first),
        sa.delete(order_index).where(order_index.c.order_date >= date(2026, 1, 7)),
        sa.delete(tables.orders).where(tables.orders.c.order_date >= date(2026, 1, 7)),
    ):
        world.chain.execute(statement)
    dry = await replay("--seq", "1", "--dry-run")
    assert world.chain.due_days() == []
    report = await replay("--seq", "1")
    assert verdicts(report) == verdicts(dry) == {"requested": 2, "skipped": 1}
    assert set(map(tuple, report["partitions"].values())) == {("2026-01-07..2026-01-09", "2026-01-12")}
    assert dry["partitions"] == report["partitions"]
    assert world.chain.due_days("orders") == [date(2026, 1, day) for day in (7, 8, 9, 12)]
    assert await doorbells(world) == 1
    await world.work()
    world.chain.assert_converged()
    handled = world.chain.rows(sa.select(import_events.c.import_id, import_events.c.stream_sequence))
    assert sorted(handled) == sorted([(first, 1), (second, 2), (third, 3)])
    assert verdicts(await replay("--seq", "1")) == {"skipped": 3}
    assert await doorbells(world) == 1


async def test_dry_run_writes_nothing_at_all(
    world: World, replay: Replay, raw_data: RawData, engine: sa.Engine
) -> None:
    withdrawn = raw_data.add_import([{"order_id": "W", "ordered_at": at(8)}], status="failed")
    await world.announce(raw_data.add_import([{}, {"order_id": None, "ordered_at": None}]), withdrawn)
    before = everything(engine)
    report = await replay("--since", "1h", "--dry-run")
    assert verdicts(report) == {"requested": 1, "ignored": 1}
    assert report["partitions"]["leads"] == ["2026-01-05"]
    assert everything(engine) == before
    assert await doorbells(world) == 0


async def test_force_asks_again_for_what_is_materialized(world: World, replay: Replay, raw_data: RawData) -> None:
    await world.announce(raw_data.add_import([{}]))
    await world.listen()
    await world.work()
    assert verdicts(await replay("--seq", "1")) == {"skipped": 1}
    assert world.chain.due_days() == []
    assert verdicts(await replay("--seq", "1", "--force")) == {"requested": 1}
    assert world.chain.due_days("orders") == [date(2026, 1, 5)]


async def test_lost_withdrawal_is_not_taken_for_the_import_that_is_done(
    world: World, replay: Replay, raw_data: RawData
) -> None:
    """导入做完了，撤回的事件监听器没有见到：流里那一个仍要求它的日子。"""
    import_id = raw_data.add_import([{}])
    await world.announce(import_id)
    await world.listen()
    await world.work()
    raw_data.set_status(import_id, "failed")
    (sequence,) = await world.announce(import_id, status="failed")
    assert verdicts(await replay("--seq", "1")) == {"skipped": 1, "requested": 1}
    await world.work()
    world.chain.assert_converged()
    assert world.chain.rows(sa.select(import_events.c.stream_sequence)) == [(sequence,)]


async def test_held_days_of_an_event_are_asked_for_again(world: World, replay: Replay, raw_data: RawData) -> None:
    await world.announce(raw_data.add_import([{}]))
    await world.listen()
    world.chain.execute(sa.update(ledger).values(held_reason="cancelled"))
    assert verdicts(await replay("--seq", "1")) == {"requested": 1}
    assert world.chain.rows(sa.select(ledger.c.held_reason).distinct()) == [(None,)]


async def test_older_event_with_a_sequence_of_an_earlier_stream_is_not_skipped(
    world: World, replay: Replay, raw_data: RawData
) -> None:
    """流重建之后序号从头来：台账里的大序号是旧流的，不能算是更晚的事件。"""
    import_id = raw_data.add_import([{}])
    await world.announce(import_id)
    await world.listen()
    await world.work()
    earlier = datetime.now(UTC) - timedelta(hours=1)
    world.chain.execute(sa.update(import_events).values(stream_sequence=5_000, event_id=uuid4(), handled_at=earlier))
    assert verdicts(await replay("--seq", "1")) == {"requested": 1}
    later = datetime.now(UTC) + timedelta(hours=1)
    await world.work()
    world.chain.execute(sa.update(import_events).values(stream_sequence=5_000, event_id=uuid4(), handled_at=later))
    assert verdicts(await replay("--seq", "1")) == {"skipped": 1}


async def test_what_cannot_be_replayed_is_counted_and_named(
    world: World, run: Run, replay: Replay, raw_data: RawData
) -> None:
    pending = raw_data.add_import([{}], status="pending")
    missing = uuid4()
    await world.connection.publish(DATA_IMPORT_COMPLETED, b"{", message_id="poison")
    await world.announce(pending, missing)
    await world.announce(raw_data.add_import([{}]), status="archived")
    await world.connection.publish("events.somebody.else", b"{}", message_id="else")
    await world.connection.publish(LEADS_ETL_COMPLETED, b"{}", message_id="leads")
    report = await replay("--seq", "1")
    assert verdicts(report) == {"invalid": 1, "not_completed": 2, "ignored": 1}
    assert [(problem["sequence"], problem["verdict"]) for problem in report["problems"]] == [
        (1, "invalid"),
        (2, "not_completed"),
        (3, "not_completed"),
    ]
    assert report["problems"][2]["reason"] == f"import {missing} is not in import_tasks"
    assert "sequence 1 (events.data_import.completed): invalid: not JSON" in (await run("--seq", "1")).stderr
    assert await doorbells(world) == 0


async def test_completions_of_another_etl_are_followed_once(
    world: World, replay: Replay, raw_data: RawData, engine: sa.Engine
) -> None:
    """别处写完订单：下游没有接着做的要求一遍，接着做完了的不再要求；自己的、失败的不算。"""
    raw_data.add_import([{}])
    world.chain.run(date(2026, 1, 5))
    with engine.connect() as connection:
        own = str(installation_id(connection))
    for extra in ({}, {"installation": own}, {"status": "failed"}, {"target": "shadow"}):
        fields = {"status": "success", "partitions": ["2026-01-05", "1999-01-01"], "run_id": "r"} | extra
        await world.publish(EtlCompleted.model_validate(fields), ORDERS_ETL_COMPLETED)
    report = await replay("--seq", "1")
    assert verdicts(report) == {"requested": 1, "ignored": 3}
    assert report["partitions"] == {"orders": [], "customers": ["2026-01-05"], "leads": ["2026-01-05"]}
    assert (world.chain.due_days("orders"), world.chain.due_days("customers")) == ([], [date(2026, 1, 5)])
    assert verdicts(await replay("--seq", "1")) == {"requested": 1, "ignored": 3}
    await world.work()
    assert verdicts(await replay("--seq", "1")) == {"skipped": 1, "ignored": 3}
    assert verdicts(await replay("--seq", "1", "--force")) == {"requested": 1, "ignored": 3}


async def test_only_the_chosen_stretch_and_subject_is_replayed(
    world: World, run: Run, replay: Replay, raw_data: RawData
) -> None:
    imports = [raw_data.add_import([{"order_id": f"A-{day}", "ordered_at": at(day)}]) for day in (5, 6, 7)]
    await world.announce(*imports)
    await world.publish(
        EtlCompleted(status="success", partitions=(date(2026, 1, 9),), run_id="r"), ORDERS_ETL_COMPLETED
    )

    async def orders(*arguments: str) -> list[str]:
        ranges: list[str] = (await replay(*arguments, "--dry-run"))["partitions"]["orders"]
        return ranges

    second = await stored_message(world.connection, "EVENTS", 2)
    assert second is not None
    assert await orders("--seq", "2", "--to-seq", "2") == ["2026-01-06"]
    assert await orders("--since", second.stored_at.isoformat()) == ["2026-01-06..2026-01-07"]
    assert await orders("--since", "2h", "--until", second.stored_at.isoformat()) == ["2026-01-05"]
    assert await orders("--since", "2h", "--until", "1h") == []
    assert await orders("--seq", "4000") == []
    assert (await replay("--seq", "1", "--dry-run", "--subject", ORDERS_ETL_COMPLETED))["events"] == 1
    await world.connection.context.purge_stream("EVENTS", seq=3)
    for since in (["--seq", "1"], ["--since", second.stored_at.isoformat()]):
        result = await run(*since, "--dry-run")
        assert "warning: the stream begins at sequence 3, older events are gone" in result.stderr
    assert "warning" not in (await run("--seq", "3", "--dry-run")).stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "say where to begin"),
        (["--since", "1h", "--seq", "1"], "say where to begin"),
        (["--seq", "1", "--until", "1h", "--to-seq", "2"], "exclude each other"),
        (["--seq", "5", "--to-seq", "2"], "--seq 5 is after --to-seq 2"),
        (["--since", "yesterday"], "'yesterday' is not a time"),
        (["--since", "99999999d"], "is not a time"),
        (["--seq", "1", "--subject", "events.other"], "only events of events.data_import.completed, "),
    ],
)
async def test_unclear_choice_is_refused(run: Run, arguments: list[str], problem: str) -> None:
    result = await run(*arguments)
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


async def test_events_of_a_handler_that_the_ledger_does_not_know_are_left_out(
    world: World, run: Run, replay: Replay, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    @event_task_handler(subject="events.other", event_type=Event, task_name="task")
    async def on_other(events: Sequence[ReceivedEvent[Event]]) -> Sequence[Decision]:
        return [Done() for _ in events]

    monkeypatch.setattr("bridge.operations.replay.handlers_of", lambda graph: (*handlers.handlers_of(graph), on_other))
    await world.publish(Event(status="x"), "events.other")
    await world.announce(raw_data.add_import([{}]))
    assert verdicts(await replay("--seq", "1")) == {"requested": 1}
    result = await run("--seq", "1", "--subject", "events.other")
    assert (result.exit_code, "can be replayed" in result.stderr) == (2, True)
