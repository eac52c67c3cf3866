"""事件监听器对真 NATS：先有效果与门铃，后有确认；毒事件各进一次死信；断线、重启、停止都不丢。"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import DiscardPolicy, RawStreamMsg, RetentionPolicy, StreamConfig
from nats.js.errors import BadRequestError, NotFoundError

from bridge.errors import PayloadTooLargeError, StreamConflictError, StreamMissingError
from bridge.events import DataImportCompleted, EtlCompleted, settling, streams
from bridge.events import listener as listener_module
from bridge.events.event_task_utils import (
    Decision,
    Done,
    EventTaskHandler,
    Ignored,
    NotYet,
    ReceivedEvent,
    Rejected,
    event_task_handler,
)
from bridge.events.listener import Listener
from bridge.events.streams import consumer_names
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.pull import Puller
from bridge.jetstream.streams import ensure_stream
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    PermanentError,
    SettingsError,
    TransientError,
)
from etl_assets.core.log import RepeatedWarning, get_logger

from .conftest import NatsServer

Batch = Sequence[ReceivedEvent[DataImportCompleted]]
Decide = Callable[[Batch], Awaitable[Sequence[Decision]]]
DEAD_SUBJECT = "events_dlq.data_import.completed"


@pytest.fixture
def settings(nats_server: NatsServer) -> BridgeSettings:
    return BridgeSettings(
        nats_url=nats_server.url,
        event_ack_wait_seconds=1,
        event_retry_seconds=1,
        event_retry_delay_seconds=0.02,
        event_max_attempts=3,
        listener_batch_milliseconds=50,
    )


class Bench:
    """一台装好流的工作台：发事件，开监听器，看死信与消费者。"""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self.connection = JetStreamConnection(settings, name="test")
        self.rings: list[tuple[str, Lane]] = []

    async def add_stream(self, **options: Any) -> None:
        await self.connection.context.add_stream(
            StreamConfig(**({"name": "EVENTS", "subjects": ["events.>"]} | options))
        )

    async def publish(
        self, data: bytes | None = None, *, subject: str = DATA_IMPORT_COMPLETED, import_id: UUID | None = None
    ) -> UUID:
        event = DataImportCompleted(import_id=import_id or uuid4())
        await self.connection.publish(
            subject, event.model_dump_json().encode() if data is None else data, message_id=str(uuid4())
        )
        return event.import_id

    def listener(self, decide: Decide, *, ring: Callable[[str, Lane], Awaitable[None]] | None = None) -> Listener:
        return Listener(self.settings, handlers=[handler_of(decide)], ring=ring or self.ring)

    async def ring(self, task_name: str, lane: Lane) -> None:
        self.rings.append((task_name, lane))

    async def unacknowledged(self) -> int:
        """还没确认的：在手里的与还没取的。"""
        names = await consumer_names(self.settings, self.connection)
        infos = [await self.connection.context.consumer_info("EVENTS", name) for name in names]
        return sum((info.num_ack_pending or 0) + (info.num_pending or 0) for info in infos)

    async def all_acknowledged(self) -> None:
        async with asyncio.timeout(20):
            while await self.unacknowledged():
                await asyncio.sleep(0.02)

    async def eventually(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def eventually_consumer(self) -> None:
        """监听器建好（或重建）了流与消费者。"""
        async with asyncio.timeout(20):
            while not await consumer_names(self.settings, self.connection):
                await asyncio.sleep(0.02)

    async def dead_letter_count(self) -> int:
        with suppress(NotFoundError):
            return (await self.connection.context.stream_info("EVENTS_DLQ")).state.messages
        return 0

    async def dead_letters(self, count: int) -> list[RawStreamMsg]:
        """等到有 count 封死信。"""
        async with asyncio.timeout(20):
            while await self.dead_letter_count() < count:
                await asyncio.sleep(0.02)
        return [
            await self.connection.context.get_msg("EVENTS_DLQ", sequence)
            for sequence in range(1, await self.dead_letter_count() + 1)
        ]


@pytest.fixture
async def bench(settings: BridgeSettings) -> AsyncIterator[Bench]:
    workbench = Bench(settings)
    await workbench.connection.open()
    yield workbench
    await workbench.connection.close()


def handler_of(decide: Decide) -> EventTaskHandler[DataImportCompleted]:
    return event_task_handler(
        subject=DATA_IMPORT_COMPLETED,
        event_type=DataImportCompleted,
        required_fields=("import_id",),
        task_name="materialize",
    )(decide)


@asynccontextmanager
async def running(listener: Listener) -> AsyncIterator[asyncio.Event]:
    """开着的监听器；离开时请它停下，并等它停好。"""
    stop = asyncio.Event()
    task = asyncio.create_task(listener.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


def import_ids(events: Batch) -> list[UUID]:
    return [event.event.import_id for event in events]


async def test_events_of_a_batch_share_one_call_and_one_doorbell(bench: Bench) -> None:
    calls: list[list[UUID]] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        calls.append(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    published = [await bench.publish() for _ in range(50)]
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: calls)
        await bench.all_acknowledged()
    assert calls == [published]
    assert bench.rings == [("materialize", "event")]


async def test_event_carries_where_and_when_it_was_stored(bench: Bench) -> None:
    seen: list[ReceivedEvent[DataImportCompleted]] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        seen.extend(events)
        return [Done(ring=False)] * len(events)

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: seen)
    assert (seen[0].subject, seen[0].sequence, seen[0].attempt) == (DATA_IMPORT_COMPLETED, 1, 1)
    assert abs((datetime.now(UTC) - seen[0].published_at).total_seconds()) < 20
    assert bench.rings == []


async def test_nothing_is_acknowledged_before_the_doorbell_is_stored(bench: Bench) -> None:
    pending: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        pending.append(await bench.unacknowledged())
        return [Done()] * len(events)

    async def ring(_task_name: str, _lane: Lane) -> None:
        pending.append(await bench.unacknowledged())

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide, ring=ring)):
        await bench.eventually(lambda: len(pending) == 2)
        await bench.all_acknowledged()
    assert pending == [1, 1]


async def test_events_come_again_when_the_doorbell_cannot_be_rung(bench: Bench) -> None:
    attempts: list[int] = []
    rings: list[str] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        attempts.extend(event.attempt for event in events)
        return [Done()] * len(events)

    async def ring(task_name: str, _lane: Lane) -> None:
        rings.append(task_name)
        if len(rings) < 4:
            raise TransientError("the task queue is away")

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide, ring=ring)):
        await bench.eventually(lambda: len(rings) == 4)
        await bench.all_acknowledged()
    assert attempts == [1, 2, 3, 4]
    assert await bench.dead_letter_count() == 0


def poison(settings: BridgeSettings) -> dict[str, bytes]:
    """每一种毒事件，与理由的开头。"""
    good = json.loads(DataImportCompleted(import_id=uuid4()).model_dump_json())
    return {
        "not JSON": b"\xff{",
        "a JSON list instead of an object": b"[1]",
        "event_version is '9.9', supported is '1.0'": json.dumps(good | {"event_version": "9.9"}).encode(),
        "field import_id is missing": json.dumps(
            {key: value for key, value in good.items() if key != "import_id"}
        ).encode(),
        "field import_id: Input should be a valid UUID": json.dumps(good | {"import_id": "7-7"}).encode(),
        "field status: Input should be a valid string": json.dumps(good | {"status": 7}).encode(),
        f"{settings.event_max_bytes + 1} bytes, ETL_EVENT_MAX_BYTES allows": b"x" * (settings.event_max_bytes + 1),
    }


async def test_each_poison_gives_one_log_line_and_one_dead_letter_and_the_next_event_is_handled(bench: Bench) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    kinds = poison(bench.settings)
    good = []
    for data in kinds.values():
        await bench.publish(data)
        good.append(await bench.publish())
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            letters = await bench.dead_letters(len(kinds))
            await bench.all_acknowledged()
    assert handled == good
    lines = [line for line in logs if line["log_level"] in ("warning", "error")]
    assert {line["event"] for line in lines} == {"event dead-lettered"}
    for expected, line in zip(kinds, sorted(lines, key=lambda line: line["stream_sequence"]), strict=True):
        assert line["reason"].startswith(expected)
    by_sequence = {int((letter.headers or {})["Etl-Sequence"]): letter for letter in letters}
    for sequence, (expected, data) in enumerate(kinds.items()):
        letter = by_sequence[2 * sequence + 1]
        headers = letter.headers or {}
        assert letter.subject == DEAD_SUBJECT
        assert letter.data == data[:4_096]
        assert headers["Etl-Reason"].startswith(expected)
        assert (headers["Etl-Subject"], headers["Etl-Stream"], headers["Etl-Attempts"]) == (
            DATA_IMPORT_COMPLETED,
            "EVENTS",
            "1",
        )


async def test_garbage_is_kept_cut_and_what_can_be_retried_is_kept_whole(bench: Bench) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Rejected("no such shop")] * len(events)

    await bench.add_stream()
    garbage = b"x" * 1_000_000
    await bench.publish(garbage)
    good = DataImportCompleted.model_validate({"import_id": uuid4(), "note": "n" * 200_000}).model_dump_json().encode()
    await bench.publish(good)
    async with running(bench.listener(decide)):
        letters = await bench.dead_letters(2)
        await bench.all_acknowledged()
    cut, whole = sorted(letters, key=lambda letter: len(letter.data or b""))
    headers = cut.headers or {}
    assert (cut.data, headers["Etl-Original-Bytes"]) == (garbage[:4_096], "1000000")
    assert headers["Etl-Sha256"] == hashlib.sha256(garbage).hexdigest()
    assert whole.data == good
    assert "Etl-Sha256" not in (whole.headers or {})


async def test_events_wait_while_the_dead_letters_are_full_and_good_ones_pass(bench: Bench) -> None:
    """旧的死信不丢，新的不埋：事件留在 EVENTS，不占尝试次数，日志一分钟一句；有了地方自己就进去了。"""
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    bench.settings = bench.settings.model_copy(update={"event_retry_delay_max_seconds": 0.2})
    await bench.add_stream()
    full = StreamConfig(
        name="EVENTS_DLQ", subjects=["events_dlq.>"], max_msgs=2, discard=DiscardPolicy.OLD, duplicate_window=600
    )
    await bench.connection.context.add_stream(full)
    for number in range(6):
        await bench.publish(b"garbage %d" % number)
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.dead_letters(2)
            good = [await bench.publish() for _ in range(5)]
            await bench.eventually(lambda: set(handled) == set(good))
            await asyncio.sleep(0.6)
            assert await bench.dead_letter_count() == 2
            assert await bench.unacknowledged() == 4
            await bench.connection.context.update_stream(
                (await bench.connection.context.stream_info("EVENTS_DLQ")).config, max_msgs=-1
            )
            letters = await bench.dead_letters(6)
            await bench.all_acknowledged()
    assert {letter.data for letter in letters} == {b"garbage %d" % number for number in range(6)}
    said = [line for line in logs if line["event"].startswith("the dead letters are full")]
    assert len(said) == 1
    assert "`etl dlq list`" in said[0]["remedy"]


async def test_event_of_a_newer_version_is_kept_whole(bench: Bench) -> None:
    """升级之后放得回来。"""

    async def decide(_: Batch) -> Sequence[Decision]:
        raise AssertionError

    await bench.add_stream()
    newer = DataImportCompleted.model_validate({"import_id": uuid4(), "event_version": "2.0", "note": "n" * 20_000})
    await bench.publish(newer.model_dump_json().encode())
    async with running(bench.listener(decide)):
        (letter,) = await bench.dead_letters(1)
    assert letter.data == newer.model_dump_json().encode()


async def test_deleted_stream_of_dead_letters_is_made_again_and_good_events_do_not_wait_for_it(bench: Bench) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    async with running(bench.listener(decide)):
        await bench.eventually_consumer()
        await bench.publish()
        await bench.eventually(lambda: handled)
        await bench.connection.context.delete_stream("EVENTS_DLQ")
        await bench.publish(b"garbage")
        start = time.monotonic()
        for count in range(2, 7):
            await bench.publish()
            await bench.eventually(lambda count=count: len(handled) == count)
        assert time.monotonic() - start < 1.5
        (letter,) = await bench.dead_letters(1)
        await bench.all_acknowledged()
    assert letter.data == b"garbage"


async def test_no_more_letters_are_written_at_once_than_allowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "LETTERS_AT_ONCE", 3)
    monkeypatch.setattr(settling, "REFUSED_DELAY_SECONDS", 0.05)

    async def decide(_: Batch) -> Sequence[Decision]:
        raise AssertionError

    await bench.add_stream()
    for number in range(20):
        await bench.publish(b"garbage %d" % number)
    async with running(bench.listener(decide)):
        await bench.dead_letters(20)
        await bench.all_acknowledged()
    assert await bench.dead_letter_count() == 20


async def test_failures_of_events_that_others_finished_are_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "FAILURES_KEPT", 5)
    bench.settings = bench.settings.model_copy(update={"event_max_attempts": 100, "event_retry_delay_seconds": 30})
    failed: set[UUID] = set()

    async def decide(events: Batch) -> Sequence[Decision]:
        failed.update(import_ids(events))
        raise ZeroDivisionError

    await bench.add_stream()
    for _ in range(12):
        await bench.publish()
    listener = bench.listener(decide)
    async with running(listener):
        await bench.eventually(lambda: len(failed) == 12)
    assert len(listener._settler._failures) == 5


async def test_stream_that_we_create_refuses_what_is_too_large_to_be_an_event(bench: Bench) -> None:
    """一千条 1 MB 的垃圾占不满它；六十 KB 的消息头还进得来，处理了，也不进死信。"""
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    async with running(bench.listener(decide)):
        await bench.eventually_consumer()
        for _ in range(3):
            with pytest.raises(PayloadTooLargeError, match="exceeds the max_msg_size of its stream"):
                await bench.publish(b"x" * 1_000_000)
        event = DataImportCompleted(import_id=uuid4())
        headers = {"X-Trace": "t" * 60_000}
        await bench.connection.publish(
            DATA_IMPORT_COMPLETED, event.model_dump_json().encode(), message_id="large", headers=headers
        )
        await bench.eventually(lambda: handled)
        await bench.all_acknowledged()
    assert handled == [event.import_id]
    assert await bench.dead_letter_count() == 0


async def test_event_of_another_status_is_acknowledged_with_a_log_line(bench: Bench) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Ignored("status archived is none of ours" + "!" * 200_000)] * len(events)

    await bench.add_stream()
    await bench.publish()
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually(lambda: [line for line in logs if line["event"] == "event ignored"])
            await bench.all_acknowledged()
    (said,) = [line for line in logs if line["event"] == "event ignored"]
    assert len(said["reason"]) <= 300
    assert bench.rings == []


async def test_event_whose_import_is_not_there_yet_is_tried_again_until_it_is(bench: Bench) -> None:
    attempts: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        attempts.append(events[0].attempt)
        return [Done() if events[0].attempt == 3 else NotYet("the import is pending")]

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: len(attempts) == 3)
        await bench.all_acknowledged()
    assert attempts == [1, 2, 3]
    assert await bench.dead_letter_count() == 0
    assert bench.rings == [("materialize", "event")]


async def test_events_that_are_not_ready_do_not_flood_the_log(bench: Bench) -> None:
    attempts: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        attempts.extend(event.attempt for event in events)
        return [Done() if event.attempt == 3 else NotYet("it is early") for event in events]

    await bench.add_stream()
    for _ in range(50):
        await bench.publish()
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually(lambda: len(attempts) == 150)
            await bench.all_acknowledged()
    assert [line["event"] for line in logs if line["event"] not in ("ready", "event handled")] == [
        "event not ready, trying again"
    ]


async def test_event_whose_import_never_comes_is_dead_lettered_after_the_bounded_time(bench: Bench) -> None:
    attempts: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        attempts.append(events[0].attempt)
        return [NotYet("import is not in import_tasks")]

    await bench.add_stream()
    await bench.publish()
    start = time.monotonic()
    async with running(bench.listener(decide)):
        (letter,) = await bench.dead_letters(1)
    assert time.monotonic() - start >= 1
    # 间隔翻倍：一秒之内不会敲几十次
    assert 3 <= len(attempts) <= 8
    headers = letter.headers or {}
    assert headers["Etl-Reason"].startswith("import is not in import_tasks; given up 1 s after it was published")
    assert headers["Etl-Attempts"] == str(len(attempts))


@pytest.mark.parametrize(
    "error",
    [
        TransientError("database away"),
        DatabaseUnavailableError("database away"),
        DatabaseRefusedError("no such table"),
        psycopg.errors.ReadOnlySqlTransaction("cannot execute INSERT"),
        sa.exc.TimeoutError("QueuePool limit of size 5 overflow 5 reached"),
        SettingsError("ETL_TIMEZONE is wrong"),
        StreamMissingError("tasks.event"),
        OSError(24, "Too many open files"),
        ConnectionResetError(),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_batch_comes_again_while_something_is_wrong_with_us(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "REFUSED_PAUSE_SECONDS", 0)
    calls: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        calls.append(events[0].attempt)
        # 比 event_max_attempts 多：暂时的错误不计次数
        if len(calls) <= 5:
            raise error
        return [Done()] * len(events)

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: len(calls) == 6)
        await bench.all_acknowledged()
    assert calls == [1, 2, 3, 4, 5, 6]
    assert await bench.dead_letter_count() == 0


async def test_attempts_are_not_spent_while_the_database_refuses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """等了很久之后头一回失败，不是最后一回。"""
    monkeypatch.setattr(listener_module, "REFUSED_PAUSE_SECONDS", 0)
    calls: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        calls.append(events[0].attempt)
        if len(calls) <= 4:
            raise DatabaseRefusedError("no such table")
        if len(calls) < 4 + bench.settings.event_max_attempts:
            raise ZeroDivisionError
        return [Done()] * len(events)

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: len(calls) >= 4 + bench.settings.event_max_attempts)
        await bench.all_acknowledged()
    assert await bench.dead_letter_count() == 0


@pytest.mark.parametrize(
    "error",
    [DatabaseRefusedError("index is corrupted"), TransientError("temporary file size exceeds temp_file_limit")],
    ids=lambda error: type(error).__name__,
)
async def test_event_that_alone_meets_an_error_of_ours_does_not_stop_the_others(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """坏了的一页、一张表的权限、太小的上限：只有碰到它的事件等着。"""
    monkeypatch.setattr(listener_module, "REFUSED_PAUSE_SECONDS", 0)
    done: list[UUID] = []
    await bench.add_stream()
    refused = [await bench.publish() for _ in range(4)]
    good = [await bench.publish() for _ in range(6)]

    async def decide(events: Batch) -> Sequence[Decision]:
        wanted = import_ids(events)
        if set(refused) & set(wanted):
            raise error
        done.extend(wanted)
        return [Done()] * len(events)

    async with running(bench.listener(decide)):
        await bench.eventually(lambda: len(done) == len(good))
        assert await bench.unacknowledged() >= len(refused)
    assert sorted(done) == sorted(good)
    assert await bench.dead_letter_count() == 0


@pytest.mark.parametrize(
    "of_batch", [PermanentError("one row is bad"), ValueError("a bug")], ids=lambda error: type(error).__name__
)
async def test_events_that_were_not_tried_alone_are_not_judged_by_what_the_batch_met(
    bench: Bench, of_batch: Exception
) -> None:
    """一批里有一个毒的，逐个再来时数据库正好不让做：没轮到的不替它进死信，也不各等一回。"""
    tried: list[UUID] = []
    done: list[UUID] = []
    is_locked = True
    await bench.add_stream()
    wanted = [await bench.publish() for _ in range(20)]

    async def decide(events: Batch) -> Sequence[Decision]:
        if is_locked and len(events) > 1:
            raise of_batch
        if is_locked:
            tried.extend(import_ids(events))
            raise TransientError("another run holds the rows")
        done.extend(import_ids(events))
        return [Done()] * len(events)

    bench.settings = bench.settings.model_copy(update={"event_retry_delay_seconds": 1.0})
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: len(tried) >= 3)
        await asyncio.sleep(0.3)
        assert len(tried) == 3
        is_locked = False
        await bench.eventually(lambda: len(done) == len(wanted))
    assert await bench.dead_letter_count() == 0


async def test_listener_asks_a_database_that_refuses_every_few_seconds_not_all_the_time(bench: Bench) -> None:
    calls: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        calls.append(len(events))
        raise DatabaseRefusedError("no such table")

    await bench.add_stream()
    for _ in range(40):
        await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: calls)
        await asyncio.sleep(1)
        stopping_at = time.monotonic()
    assert time.monotonic() - stopping_at < 1  # 等着的时候，叫停就停
    assert len(calls) <= 4  # 一批，与其中的三个


async def test_refused_data_buries_the_event_at_once(bench: Bench) -> None:
    async def decide(_events: Batch) -> Sequence[Decision]:
        raise psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes")

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        (letter,) = await bench.dead_letters(1)
    assert (letter.headers or {})["Etl-Attempts"] == "1"


async def test_one_event_that_breaks_the_handler_does_not_hold_up_the_batch(bench: Bench) -> None:
    await bench.add_stream()
    good = [await bench.publish() for _ in range(3)]
    hopeless = await bench.publish()
    buggy = await bench.publish()
    good += [await bench.publish() for _ in range(3)]
    done: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        wanted = import_ids(events)
        if hopeless in wanted:
            raise PermanentError("this import breaks a rule")
        if buggy in wanted:
            raise ZeroDivisionError
        done.extend(wanted)
        return [Done()] * len(events)

    async with running(bench.listener(decide)):
        letters = await bench.dead_letters(2)
        await bench.all_acknowledged()
    assert sorted(done) == sorted(good)
    reasons = {json.loads(letter.data or b"")["import_id"]: letter.headers or {} for letter in letters}
    assert reasons[str(hopeless)]["Etl-Reason"] == "handler failed: PermanentError: this import breaks a rule"
    assert reasons[str(hopeless)]["Etl-Attempts"] == "1"
    assert reasons[str(buggy)]["Etl-Reason"].startswith("handler failed: ZeroDivisionError")
    assert reasons[str(buggy)]["Etl-Attempts"] == "3"


async def test_rejected_event_is_dead_lettered_once_also_when_it_comes_again(bench: Bench) -> None:
    """进了死信、还没来得及终结就崩溃：重投之后编号相同，只有一封。"""

    async def decide(events: Batch) -> Sequence[Decision]:
        return [Rejected("no such import will ever come")] * len(events)

    await bench.add_stream()
    await bench.publish()
    listener = bench.listener(decide)
    await ensure_stream(
        bench.connection, StreamConfig(name="EVENTS_DLQ", subjects=["events_dlq.>"], duplicate_window=600)
    )
    async with running(listener):
        (letter,) = await bench.dead_letters(1)
        await bench.all_acknowledged()
    message_id = (letter.headers or {})["Nats-Msg-Id"]
    again = await bench.connection.publish(DEAD_SUBJECT, b"{}", message_id=message_id)
    assert again.duplicate


async def test_wrong_number_of_decisions_loses_no_event(bench: Bench) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * (len(events) - 1)

    await bench.add_stream()
    await bench.publish()
    async with running(bench.listener(decide)):
        (letter,) = await bench.dead_letters(1)
    assert "ValueError" in (letter.headers or {})["Etl-Reason"]


async def test_event_of_a_listener_that_crashed_goes_to_the_next(bench: Bench) -> None:
    started = asyncio.Event()

    async def hang(events: Batch) -> Sequence[Decision]:
        started.set()
        await asyncio.Event().wait()
        return [Done()] * len(events)

    seen: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        seen.extend(event.attempt for event in events)
        return [Done()] * len(events)

    await bench.add_stream()
    await bench.publish()
    crashing = asyncio.create_task(bench.listener(hang).run(asyncio.Event()))
    await asyncio.wait_for(started.wait(), 10)
    crashing.cancel()
    await asyncio.wait({crashing})
    assert await bench.unacknowledged() == 1
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: seen)
        await bench.all_acknowledged()
    assert seen == [2]


async def test_handler_slower_than_the_ack_wait_runs_once(bench: Bench) -> None:
    calls: list[int] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        calls.append(events[0].attempt)
        await asyncio.sleep(bench.settings.event_ack_wait_seconds * 2.5)
        return [Done()] * len(events)

    await bench.add_stream()
    await bench.publish()
    # 另有一个监听器闲着：不报平安，它就会再拿到一次
    async with running(bench.listener(decide)), running(bench.listener(decide)):
        await bench.eventually(lambda: calls)
        await bench.all_acknowledged()
    assert calls == [1]


async def test_killing_and_restarting_nats_in_mid_consumption_loses_nothing(
    bench: Bench, nats_server: NatsServer
) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        await asyncio.sleep(0.01)
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    bench.settings = bench.settings.model_copy(update={"listener_batch_size": 5})
    published = [await bench.publish() for _ in range(200)]
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually(lambda: len(handled) > 20)
            nats_server.kill()
            await asyncio.sleep(0.3)
            nats_server.start()
            published += [await bench.publish() for _ in range(20)]
            await bench.all_acknowledged()
    assert set(handled) == set(published)
    # 断线在日志里是几行，不是每次重连一行
    assert len([line for line in logs if line["log_level"] == "warning"]) < 10


async def test_idle_listener_hears_the_first_event_after_a_restart_of_nats(
    bench: Bench, nats_server: NatsServer
) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    async with running(bench.listener(decide)):
        await bench.eventually_consumer()
        nats_server.kill()
        nats_server.start()
        published = await bench.publish()
        # 拉取请求随旧服务器一起没了；不必等到心跳缺席才发觉
        async with asyncio.timeout(Puller.HEARTBEAT_SECONDS):
            await bench.eventually(lambda: handled)
    assert handled == [published]


async def test_consumer_that_vanished_is_made_again(bench: Bench) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream()
    first = await bench.publish()
    async with running(bench.listener(decide)):
        await bench.eventually(lambda: handled)
        await bench.connection.context.delete_stream("EVENTS")
        await bench.eventually_consumer()
        second = await bench.publish()
        await bench.eventually(lambda: len(handled) == 2)
    assert handled == [first, second]


async def test_stopping_finishes_the_batch_in_hand(bench: Bench) -> None:
    started = asyncio.Event()
    release = asyncio.Event()

    async def decide(events: Batch) -> Sequence[Decision]:
        started.set()
        await release.wait()
        return [Done()] * len(events)

    await bench.add_stream()
    await bench.publish()
    stop = asyncio.Event()
    task = asyncio.create_task(bench.listener(decide).run(stop))
    await asyncio.wait_for(started.wait(), 10)
    stop.set()
    await bench.publish()
    release.set()
    await asyncio.wait_for(task, 5)
    assert bench.rings == [("materialize", "event")]
    # 手里的确认了，停下之后来的没有动
    assert await bench.unacknowledged() == 1


async def test_idle_listener_stops_at_once_and_says_ready_before(bench: Bench) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * len(events)

    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually(lambda: [line for line in logs if line["event"] == "ready"])
            start = time.monotonic()
    assert time.monotonic() - start < 1


async def test_listener_stops_while_nats_is_away(bench: Bench, nats_server: NatsServer) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * len(events)

    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually(lambda: [line for line in logs if line["event"] == "ready"])
            nats_server.kill()
            await bench.eventually(lambda: [line for line in logs if line["event"] == "nats disconnected"])
            start = time.monotonic()
    assert time.monotonic() - start < 5


async def test_existing_stream_is_used_as_it_is(bench: Bench) -> None:
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    await bench.add_stream(subjects=["events.data_import.*", "app.>"], max_msgs=77, retention=RetentionPolicy.INTEREST)
    before = (await bench.connection.context.stream_info("EVENTS")).config
    async with running(bench.listener(decide)):
        await bench.eventually_consumer()
        published = await bench.publish()
        await bench.eventually(lambda: handled)
    assert handled == [published]
    assert (await bench.connection.context.stream_info("EVENTS")).config == before


async def test_stream_that_does_not_carry_the_subjects_is_one_clear_error(bench: Bench) -> None:
    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * len(events)

    await bench.add_stream(subjects=["app.>"])
    with pytest.raises(
        StreamConflictError,
        match=r"stores app\.>, which does not cover events\.data_import\.completed; add these subjects",
    ):
        await bench.listener(decide).run(asyncio.Event())


async def test_stream_that_cannot_keep_the_promise_is_refused_and_one_that_keeps_most_of_it_is_warned_of(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 同样的话一分钟只说一次：别的测试也许刚说过
    fresh = RepeatedWarning(get_logger(__name__), "the stream of events does not keep all that is promised")
    monkeypatch.setattr(streams, "_weak", fresh)

    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * len(events)

    await bench.add_stream(max_msgs_per_subject=1)
    with pytest.raises(
        StreamConflictError, match=r"cannot be used: it keeps 1 messages per subject, and .*; `nats stream"
    ):
        await bench.listener(decide).run(asyncio.Event())
    await bench.connection.context.delete_stream("EVENTS")
    await bench.add_stream(retention=RetentionPolicy.INTEREST)
    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually_consumer()
    (said,) = [line["problem"] for line in logs if line["event"].startswith("the stream of events does not keep")]
    assert said.startswith("it drops what is published while our consumers are not there")


async def test_stream_that_is_made_again_in_a_bad_way_is_waited_for(bench: Bench) -> None:
    """跑着的监听器不因此结束：说一声，改好了就接着做。"""
    handled: list[UUID] = []

    async def decide(events: Batch) -> Sequence[Decision]:
        handled.extend(import_ids(events))
        return [Done()] * len(events)

    with structlog.testing.capture_logs() as logs:
        async with running(bench.listener(decide)):
            await bench.eventually_consumer()
            while True:  # 监听器也在重建它：抢在它前面
                await bench.connection.context.delete_stream("EVENTS")
                with suppress(BadRequestError):
                    await bench.add_stream(max_msgs_per_subject=1)
                    break
            await bench.eventually(
                lambda: [line for line in logs if line["event"] == "cannot restore the consumer yet"]
            )
            await bench.connection.context.delete_stream("EVENTS")
            await bench.eventually_consumer()
            published = await bench.publish()
            await bench.eventually(lambda: handled)
    assert handled == [published]


async def test_event_of_a_subject_that_it_does_not_know_is_given_back(bench: Bench) -> None:
    """不该有的事：有人改宽了消费者的过滤。不是自己的就不确认。"""

    async def decide(events: Batch) -> Sequence[Decision]:
        return [Done()] * len(events)

    await bench.add_stream()
    async with running(bench.listener(decide)):
        await bench.eventually_consumer()
        (name,) = await consumer_names(bench.settings, bench.connection)
        info = await bench.connection.context.consumer_info("EVENTS", name)
        await bench.connection.context.add_consumer("EVENTS", info.config, filter_subject="events.>")
        await bench.publish(b"{}", subject="events.somebody.else")
        async with asyncio.timeout(20):
            while (await bench.connection.context.consumer_info("EVENTS", name)).num_redelivered == 0:
                await asyncio.sleep(0.02)
    assert await bench.unacknowledged() == 1
    assert await bench.dead_letter_count() == 0


async def test_two_handlers_get_their_own_events(bench: Bench) -> None:
    seen: dict[str, int] = {}

    async def decide(events: Sequence[ReceivedEvent[Any]]) -> Sequence[Decision]:
        for event in events:
            seen[event.subject] = seen.get(event.subject, 0) + 1
        return [Done()] * len(events)

    handlers = [
        handler_of(decide),
        event_task_handler(subject=ORDERS_ETL_COMPLETED, event_type=EtlCompleted, task_name="downstream")(decide),
    ]
    completion = {
        "event_id": str(uuid4()),
        "event_version": "1.0",
        "occurred_at": "2026-01-05T00:00:00Z",
        "status": "success",
    }
    await bench.add_stream()
    await bench.publish()
    await bench.publish(
        json.dumps(completion | {"partitions": ["2026-01-05"], "run_id": "r"}).encode(), subject=ORDERS_ETL_COMPLETED
    )
    await bench.publish(b"{}", subject="events.somebody.else")
    async with running(Listener(bench.settings, handlers=handlers, ring=bench.ring)):
        await bench.eventually(lambda: len(seen) == 2)
        await bench.all_acknowledged()
    assert seen == {DATA_IMPORT_COMPLETED: 1, ORDERS_ETL_COMPLETED: 1}
    assert sorted(bench.rings) == [("downstream", "event"), ("materialize", "event")]
