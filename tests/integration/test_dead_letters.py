"""etl dlq 对真 NATS：看得见、放得回去、丢得掉；放回去的先存下、后删死信。"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from nats.js.api import StreamConfig

from bridge.cli.commands import cli
from bridge.cli.dlq import dlq_command
from bridge.errors import NatsUnavailableError, StreamMissingError, UnknownLetterError
from bridge.events import DataImportCompleted, handlers
from bridge.events.event_task_utils import Decision, EventTaskHandler, ReceivedEvent, Rejected, event_task_handler
from bridge.events.listener import Listener
from bridge.events.streams import DEAD_LETTERS
from bridge.events.subjects import DATA_IMPORT_COMPLETED, dead_letter_subject, etl_completed
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import ensure_stream, stream_state
from bridge.nats_names import EVENTS_DLQ_STREAM
from bridge.queue.broker import SafeJetStreamBroker
from bridge.queue.receiver import SafeReceiver
from bridge.queue.streams import task_streams
from bridge.runs import reconciler
from bridge.settings import BridgeSettings
from etl_assets.core.errors import PermanentError
from etl_assets.core.etl_tables import import_events
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .listening import open_bridge

Dlq = Callable[..., Awaitable[Result]]


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(nats_url=nats_server.url, event_retry_seconds=1, event_retry_delay_seconds=0.02)


@pytest.fixture
async def connection(settings: BridgeSettings) -> AsyncIterator[JetStreamConnection]:
    link = JetStreamConnection(settings, name="test")
    await link.open()
    await link.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"], duplicate_window=600))
    yield link
    await link.close()


@pytest.fixture
def dlq(settings: BridgeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dlq:
    """`await dlq("list", "--json")`：像在终端里那样，自己的线程、自己的事件循环。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, bridge_settings=settings)
    return lambda *arguments: asyncio.to_thread(CliRunner().invoke, dlq_command, arguments)


async def rejected(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
    return [Rejected(f"店铺不认识 {(event.event.model_extra or {}).get('note', '')}") for event in events]


REJECTING = event_task_handler(
    subject=DATA_IMPORT_COMPLETED, event_type=DataImportCompleted, required_fields=("import_id",), task_name="task"
)(rejected)


@asynccontextmanager
async def listening(settings: BridgeSettings, handler: EventTaskHandler[DataImportCompleted]) -> AsyncIterator[None]:
    async def ring(*_: str) -> None:
        return

    stop = asyncio.Event()
    running = asyncio.create_task(Listener(settings, handlers=[handler], ring=ring).run(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)


async def holds(connection: JetStreamConnection, stream: str, messages: int) -> None:
    """等到流里正好有这么多条。"""
    async with asyncio.timeout(20):
        while (state := await stream_state(connection, stream)) is None or state.messages != messages:
            await asyncio.sleep(0.02)


async def bury_events(connection: JetStreamConnection, settings: BridgeSettings, *bodies: bytes) -> None:
    """发布这些事件，监听器一个接一个埋掉。"""
    async with listening(settings, REJECTING):
        for count, body in enumerate(bodies, 1):
            await connection.publish(DATA_IMPORT_COMPLETED, body, message_id=str(uuid4()))
            await holds(connection, "EVENTS_DLQ", count)


def event(**fields: object) -> bytes:
    return DataImportCompleted.model_validate({"import_id": uuid4()} | fields).model_dump_json().encode()


@asynccontextmanager
async def working(broker: SafeJetStreamBroker) -> AsyncIterator[None]:
    broker.is_worker_process = True
    stop = asyncio.Event()
    running = asyncio.create_task(SafeReceiver(broker, wait_tasks_timeout=10).listen(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)
        await broker.shutdown()


async def bury_task(connection: JetStreamConnection, settings: BridgeSettings, runs: list[str]) -> SafeJetStreamBroker:
    """一个任务第一次失败就进了死信；返回还会执行它的 broker。"""
    broker = SafeJetStreamBroker(settings)

    @broker.task(task_name="fragile")
    async def fragile(text: str) -> None:
        runs.append(text)
        if len(runs) == 1:
            raise PermanentError("the table is not there")

    client = SafeJetStreamBroker(settings)
    await client.startup()
    await client.ring("fragile", "interactive", "甲")
    await client.shutdown()
    async with working(broker):
        await holds(connection, "TASKS_DLQ", 1)
    return broker


async def test_letters_of_both_kinds_are_listed_newest_last(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    assert (await dlq("list", "--json")).stdout == "[]\n"
    await bury_events(connection, settings, b"{", event(note="x"))
    await bury_task(connection, settings, [])
    rows = json.loads((await dlq("list", "--json")).stdout)
    assert [row["letter_id"] for row in rows] == ["events-1", "events-2", "tasks-1"]
    assert [row["attempts"] for row in rows] == [1, 1, 1]
    assert rows[0]["reason"].startswith("not JSON")
    assert (rows[1]["subject"], rows[1]["reason"]) == (DATA_IMPORT_COMPLETED, "店铺不认识 x")
    assert (rows[2]["subject"], rows[2]["reason"]) == ("tasks.interactive", "PermanentError: the table is not there")


async def test_list_keeps_the_newest_and_says_how_many_more_there_are(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, *[event(note=f"{number}{'长' * 90}") for number in range(3)])
    result = await dlq("list", "--limit", "2")
    assert "events-1" not in result.stdout
    assert result.stdout.index("events-2") < result.stdout.index("events-3")
    assert "…" in result.stdout
    assert result.stderr == "1 older letters are not shown: --limit 3 shows all\n"
    rows = json.loads((await dlq("list", "--reason-contains", "店铺不认识 1", "--json")).stdout)
    assert [row["letter_id"] for row in rows] == ["events-2"]


async def test_show_prints_headers_and_body(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, event(note="中文"), b"\xff\x1b[31m{")
    shown = (await dlq("show", "events-1")).stdout
    assert "Etl-Reason: 店铺不认识 中文\n" in shown
    assert "Etl-Stream: EVENTS\nEtl-Sequence: 1\n" in shown
    assert '\n  "note": "中文"\n' in shown
    content = json.loads((await dlq("show", "events-1", "--json")).stdout)
    assert (content["body"]["note"], content["original_bytes"], content["headers"]["Etl-Attempts"]) == (
        "中文",
        None,
        "1",
    )
    # 毒消息里的控制字符不会到终端上
    assert "\\xff\\x1b[31m{" in (await dlq("show", "events-2")).stdout


async def test_retried_event_reaches_the_ledger_once_its_import_is_there(
    connection: JetStreamConnection,
    settings: BridgeSettings,
    dlq: Dlq,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    raw_data: RawData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconciler, "WAITING_SECONDS", 0.05)
    import_id = raw_data.add_import([{}], status="pending")
    body = event(import_id=import_id)
    await connection.publish(DATA_IMPORT_COMPLETED, body, message_id=json.loads(body)["event_id"])
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as bridge, bridge.listening():
        await holds(connection, "EVENTS_DLQ", 1)
        raw_data.set_status(import_id, "completed")
        result = await dlq("retry", "events-1")
        assert result.exit_code == 0
        # 监听器在同一个进程里，它的日志也许落进命令的输出
        assert f"events-1 is back on {DATA_IMPORT_COMPLETED}: EVENTS sequence 2" in result.stdout.splitlines()
        await holds(connection, "EVENTS_DLQ", 0)
        async with asyncio.timeout(20):
            while not (handled := handled_events(engine)):
                await asyncio.sleep(0.02)
    assert handled == [json.loads(body)["event_id"]]


def handled_events(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(event_id) for event_id in connection.scalars(sa.select(import_events.c.event_id))]


async def test_retried_task_runs_again_on_its_lane(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    runs: list[str] = []
    broker = await bury_task(connection, settings, runs)
    result = await dlq("retry", "--all")
    assert result.stdout == "tasks-1 is back on tasks.interactive: TASKS sequence 2\n"
    again = SafeJetStreamBroker(settings)
    again.local_task_registry = broker.local_task_registry
    async with working(again):
        await holds(connection, "TASKS", 0)
    assert runs == ["甲", "甲"]
    await holds(connection, "TASKS_DLQ", 0)


async def test_letter_stays_until_its_message_is_stored_and_a_crash_in_between_loses_nothing(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury_events(connection, settings, event())

    async def crash(*_: object) -> None:
        raise NatsUnavailableError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr("bridge.operations.dead_letters.delete_message", crash)
        assert isinstance((await dlq("retry", "events-1")).exception, NatsUnavailableError)
    await holds(connection, "EVENTS", 2)
    await holds(connection, "EVENTS_DLQ", 1)
    assert (await dlq("retry", "events-1")).exit_code == 0
    # 编号由死信而来：第二次没有再存一份
    await holds(connection, "EVENTS", 2)
    await holds(connection, "EVENTS_DLQ", 0)


async def test_letter_stays_when_no_stream_takes_it(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, event())
    await connection.context.delete_stream("EVENTS")
    assert isinstance((await dlq("retry", "--all")).exception, StreamMissingError)
    await holds(connection, "EVENTS_DLQ", 1)


async def test_event_that_fails_again_is_a_new_letter(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, event(note="y"))
    async with listening(settings, REJECTING):
        assert (await dlq("retry", "events-1")).exit_code == 0
        async with asyncio.timeout(20):
            while not (await connection.context.stream_info(EVENTS_DLQ_STREAM)).state.messages:
                await asyncio.sleep(0.02)
    rows = json.loads((await dlq("list", "--json")).stdout)
    assert [(row["letter_id"], row["reason"]) for row in rows] == [("events-2", "店铺不认识 y")]


@pytest.mark.parametrize(
    ("dead_subject", "changed", "problem"),
    [
        (
            "events_dlq.data_import.completed",
            {"Etl-Subject": "$JS.API.STREAM.DELETE.EVENTS"},
            "names the subject $JS.API.STREAM.DELETE.EVENTS",
        ),
        ("events_dlq.data_import.completed", {"Etl-Subject": "tasks.bulk"}, "names the subject tasks.bulk"),
        ("events_dlq.data_import.completed", {"Etl-Subject": ""}, "names the subject none"),
        (
            "events_dlq.somebody.else",
            {"Etl-Subject": "events.somebody.else"},
            "events_dlq.somebody.else is not where we put dead letters",
        ),
        (
            "events_dlq.data_import.completed",
            {"Etl-Stream": "TASKS"},
            "its headers are not those of a message of EVENTS",
        ),
        (
            "events_dlq.data_import.completed",
            {"Etl-Sequence": "one"},
            "its headers are not those of a message of EVENTS",
        ),
        (
            "tasks_dlq.bulk",
            {"Etl-Subject": "$JS.API.STREAM.DELETE.EVENTS", "Etl-Stream": "TASKS"},
            "names the subject $JS.API",
        ),
    ],
)
async def test_forged_letter_is_shown_as_such_and_its_subject_is_not_published_to(
    connection: JetStreamConnection,
    settings: BridgeSettings,
    dlq: Dlq,
    dead_subject: str,
    changed: dict[str, str],
    problem: str,
) -> None:
    """谁能写死信流，谁就能让 retry 替他发到任何主题：曾经这样删掉过 EVENTS。"""
    for config in (DEAD_LETTERS, *task_streams(settings)):
        await ensure_stream(connection, config)
    await connection.publish(DATA_IMPORT_COMPLETED, event(), message_id="good")
    headers = {
        "Etl-Reason": "x",
        "Etl-Subject": DATA_IMPORT_COMPLETED,
        "Etl-Stream": "EVENTS",
        "Etl-Sequence": "1",
        "Etl-Attempts": "1",
    }
    await connection.publish(
        dead_subject, b"", message_id="EVENTS-1-1.0", headers={k: v for k, v in (headers | changed).items() if v}
    )
    result = await dlq("retry", "--all")
    assert result.exit_code == 1
    assert problem in result.stderr
    assert "cannot be retried" in result.stderr
    await holds(connection, "EVENTS", 1)
    (row,) = json.loads((await dlq("list", "--json")).stdout)
    assert row["reason"].startswith("not a letter of ours: ")
    assert "This is not a letter of ours" in (await dlq("show", row["letter_id"])).stdout
    assert (await dlq("drop", row["letter_id"], "--yes")).exit_code == 0


@pytest.mark.parametrize(("asset", "is_listened_to"), [("orders", True), ("leads", False), ("removed", False)])
async def test_letter_that_no_handler_would_read_is_not_put_back(
    connection: JetStreamConnection,
    settings: BridgeSettings,
    dlq: Dlq,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
    asset: str,
    is_listened_to: bool,
) -> None:
    """后面没有资产的、后来拿走了的：放回 EVENTS 也没有人读，死信却没了。"""
    monkeypatch.setattr(handlers, "get_engine", lambda: engine)
    monkeypatch.setattr(handlers, "get_settings", lambda: etl_settings)
    for config in (DEAD_LETTERS, *task_streams(settings)):
        await ensure_stream(connection, config)
    subject = etl_completed(asset)
    headers = {
        "Etl-Reason": "x",
        "Etl-Subject": subject,
        "Etl-Stream": "EVENTS",
        "Etl-Sequence": "1",
        "Etl-Attempts": "1",
    }
    await connection.publish(dead_letter_subject(subject), b"{}", message_id="EVENTS-1-1.0", headers=headers)
    result = await dlq("retry", "--all")
    assert (result.exit_code, f"nothing listens to {subject}" in result.stderr) == (
        (0, False) if is_listened_to else (1, True)
    )
    await holds(connection, "EVENTS", int(is_listened_to))
    await holds(connection, "EVENTS_DLQ", int(not is_listened_to))


async def test_truncated_letter_is_refused_and_the_others_are_retried(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, b"x" * (connection.client.max_payload - 100), event())
    assert "The body was cut when it was buried: the first " in (await dlq("show", "events-1")).stdout
    result = await dlq("retry", "--all")
    assert result.exit_code == 1
    assert "error: events-1 holds only the first " in result.stderr
    assert "events-2 is back on" in result.stdout
    assert [row["letter_id"] for row in json.loads((await dlq("list", "--json")).stdout)] == ["events-1"]


@pytest.mark.parametrize("unknown", ["events-9", "tasks-1", "letters-1", "events-0", "7"])
async def test_unknown_letter_is_one_error_and_nothing_is_touched(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq, unknown: str
) -> None:
    await bury_events(connection, settings, event())
    for arguments in (["show", unknown], ["retry", "events-1", unknown], ["drop", "--yes", "events-1", unknown]):
        error = (await dlq(*arguments)).exception
        assert isinstance(error, UnknownLetterError)
        assert str(error).startswith(f"there is no dead letter {unknown}: ")
    await holds(connection, "EVENTS_DLQ", 1)
    await holds(connection, "EVENTS", 1)


@pytest.mark.parametrize("arguments", [[], ["--all", "events-1"], ["events-1", "--reason-contains", "x"]])
@pytest.mark.parametrize("command", ["retry", "drop"])
async def test_ids_or_all_not_both_and_not_neither(dlq: Dlq, command: str, arguments: list[str]) -> None:
    assert (await dlq(command, *arguments)).exit_code == 2


async def test_dropped_letters_are_printed_and_gone(
    connection: JetStreamConnection, settings: BridgeSettings, dlq: Dlq
) -> None:
    await bury_events(connection, settings, event(note="a"), event(note="b"), event(note="c"))
    refused = await dlq("drop", "events-2")
    assert (refused.exit_code, "add --yes" in refused.stderr) == (2, True)
    result = await dlq("drop", "events-2", "--yes")
    assert result.stdout == f"dropped events-2: {DATA_IMPORT_COMPLETED}: 店铺不认识 b\n"
    await dlq("drop", "--all", "--reason-contains", "认识 C", "--yes")
    assert [row["letter_id"] for row in json.loads((await dlq("list", "--json")).stdout)] == ["events-1"]


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
async def test_dropping_on_a_terminal_asks(
    connection: JetStreamConnection, settings: BridgeSettings, answer: bytes, left: int
) -> None:
    await bury_events(connection, settings, event())
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bridge.cli.main", "dlq", "drop", "--all"),
        env=os.environ | {"ETL_NATS_URL": settings.nats_url},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.write(ours, answer)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    os.close(ours)
    os.close(theirs)
    assert b"Delete 1 dead letters for good?" in stderr
    assert process.returncode == left
    await holds(connection, "EVENTS_DLQ", left)


def test_group_is_reached_through_the_entry_point() -> None:
    result = CliRunner().invoke(cli, ["dlq", "--help"])
    assert all(name in result.stdout for name in ("list", "show", "retry", "drop"))
