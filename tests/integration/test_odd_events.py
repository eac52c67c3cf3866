"""奇怪的事件，对真的监听器：能用的处理，不能用的各有一句理由进死信，前后的好事件都不受影响。"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import StreamConfig

from bridge.errors import InvalidSubjectError
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.dead_letters import GARBAGE_HEAD_BYTES
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .listening import Bridge, open_bridge

Content = dict[str, Any]


@pytest.fixture
async def bridge(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    settings = BridgeSettings(
        nats_url=nats_server.url, event_ack_wait_seconds=2, event_retry_delay_seconds=0.05, event_max_attempts=2
    )
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as made:
        await made.connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
        yield made


def content_of(import_id: UUID) -> Content:
    return {
        "event_id": str(uuid4()),
        "event_version": "1.0",
        "occurred_at": "2026-01-05T10:00:00+08:00",
        "status": "completed",
        "import_id": str(import_id),
    }


def with_fields(**fields: Any) -> Callable[[Content], bytes]:
    return lambda content: json.dumps(content | fields).encode()


def with_id(spelling: Callable[[str], str]) -> Callable[[Content], bytes]:
    return lambda content: json.dumps(content | {"import_id": spelling(content["import_id"])}).encode()


def raw(old: str, new: str) -> Callable[[Content], bytes]:
    """JSON 的文字里换一段：json.dumps 写不出的。"""
    return lambda content: json.dumps(content).replace(old, new).encode()


USABLE: dict[str, Callable[[Content], bytes]] = {
    "upper case": with_id(str.upper),
    "braces": with_id(lambda text: f"{{{text}}}"),
    "urn": with_id(lambda text: f"urn:uuid:{text}"),
    "no hyphens": with_id(lambda text: text.replace("-", "")),
    "ten thousand unknown fields": with_fields(**{f"field_{number}": number for number in range(10_000)}),
    "the year 9999": with_fields(occurred_at="9999-12-31T23:59:59-14:00"),
    "the year 1": with_fields(occurred_at="0001-01-01T00:00:00+14:00"),
    "NUL in a field that nobody reads": with_fields(note="a\x00b"),
    "a field twice, the last counts": raw('"status": "completed"', '"status": "pending", "status": "completed"'),
    "NaN in a field that nobody reads": raw("{", '{"note": NaN, '),
    "allow_deletes that is no boolean": with_fields(allow_deletes={"deep": [1]}),
    "a number of a thousand digits": raw("{", '{"note": 1' + "0" * 1_000 + ", "),
}

UNUSABLE: dict[str, tuple[Callable[[Content], bytes], str]] = {
    "half a surrogate pair": (raw("{", '{"note": "\\ud800", '), "not JSON"),
    "bytes that are not UTF-8": (lambda content: json.dumps(content).encode().replace(b"1.0", b"\xff"), "not JSON"),
    "NUL in the import id": (with_id(lambda text: text[:-1] + "\x00"), "field import_id: Input should be a valid UUID"),
    "NUL in the version": (with_fields(event_version="1.0\x00"), "event_version is '1.0\\x00', supported is '1.0'"),
    "a thousand levels deep": (raw("{", '{"note": ' + "[" * 1_000 + "]" * 1_000 + ", "), "not JSON"),
    "a number of ten thousand digits": (raw("{", '{"note": 1' + "0" * 10_000 + ", "), "not JSON"),
    "the year 10000": (
        with_fields(occurred_at="10000-01-01T00:00:00Z"),
        "field occurred_at: Input should be a valid datetime",
    ),
    "a moment without a zone": (
        with_fields(occurred_at="2026-01-05T10:00:00"),
        "field occurred_at: Input should have timezone",
    ),
    "an import id of white space": (with_id(lambda text: f" {text} "), "field import_id: Input should be a valid UUID"),
    "a byte order mark": (lambda content: b"\xef\xbb\xbf" + json.dumps(content).encode(), "not JSON"),
    "nothing": (lambda _: b"", "not JSON"),
}


async def publish(bridge: Bridge, data: bytes, **headers: str) -> None:
    await bridge.connection.publish(DATA_IMPORT_COMPLETED, data, message_id=str(uuid4()), headers=headers)


async def test_odd_but_usable_events_are_handled(bridge: Bridge, raw_data: RawData) -> None:
    contents = {kind: content_of(raw_data.add_import([{}])) for kind in USABLE}
    for kind, content in contents.items():
        await publish(bridge, USABLE[kind](content))
    large = content_of(raw_data.add_import([{}]))
    await publish(bridge, json.dumps(large).encode(), **{"X-Note": "x" * 60_000})
    wanted = {UUID(content["import_id"]): UUID(content["event_id"]) for content in [*contents.values(), large]}
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            await bridge.eventually(lambda: len(bridge.handled()) == len(wanted))
    assert bridge.handled() == wanted
    assert await bridge.letters() == []
    assert [line for line in logs if line["log_level"] in ("warning", "error")] == []


async def test_unusable_events_have_one_clear_reason_each_and_harm_nothing(bridge: Bridge, raw_data: RawData) -> None:
    good = []
    sent = {}
    for kind, (spoil, _) in UNUSABLE.items():
        good.append(raw_data.add_import([{}]))
        sent[kind] = spoil(content_of(good[-1]))
        await publish(bridge, sent[kind])
        await bridge.publish(good[-1])
    async with bridge.listening():
        letters = await bridge.letters(len(UNUSABLE))
        await bridge.eventually(lambda: bridge.handled().keys() == set(good))
    by_sequence = {int((letter.headers or {})["Etl-Sequence"]): letter for letter in letters}
    found = {kind: by_sequence[2 * place + 1] for place, kind in enumerate(UNUSABLE)}
    reasons = {kind: (letter.headers or {})["Etl-Reason"] for kind, letter in found.items()}
    assert {kind: reasons[kind] for kind, (_, reason) in UNUSABLE.items() if not reasons[kind].startswith(reason)} == {}
    heads = {kind: data[:GARBAGE_HEAD_BYTES] for kind, data in sent.items()}
    assert {kind: letter.data or b"" for kind, letter in found.items()} == heads
    assert {(letter.headers or {})["Etl-Attempts"] for letter in letters} == {"1"}


async def test_status_with_a_nul_is_ignored_like_any_other_status(bridge: Bridge, raw_data: RawData) -> None:
    await publish(bridge, with_fields(status="completed\x00")(content_of(raw_data.add_import([{}]))))
    after = await bridge.publish(raw_data.add_import([{}]))
    with structlog.testing.capture_logs() as logs:
        async with bridge.listening():
            await bridge.eventually(lambda: bridge.handled() == {after.import_id: after.event_id})
            await bridge.eventually(lambda: [line for line in logs if line["event"] == "event ignored"])
    assert await bridge.letters() == []


@pytest.mark.parametrize("status", ["completed", "pending"])
async def test_one_event_id_for_two_imports_asks_for_both(bridge: Bridge, raw_data: RawData, status: str) -> None:
    imports = [raw_data.add_import([{}], status=status) for _ in range(2)]
    event_id = uuid4()
    async with bridge.listening():
        for import_id in imports:
            await bridge.publish(import_id, event_id=event_id)
        if status == "pending":
            await bridge.eventually(lambda: bridge.waiting() == 2)
            for import_id in imports:
                raw_data.set_status(import_id, "completed")
        await bridge.eventually(lambda: bridge.handled() == dict.fromkeys(imports, event_id))


async def test_subject_with_a_trailing_dot_is_not_stored_and_says_so(bridge: Bridge) -> None:
    with pytest.raises(InvalidSubjectError, match=r"'events\.data_import\.completed\.' is not a subject to publish to"):
        await bridge.connection.publish(DATA_IMPORT_COMPLETED + ".", b"{}", message_id="dot")
    async with bridge.listening():
        event = await bridge.publish(uuid4())
        await bridge.eventually(lambda: bridge.waiting() == 1)
    assert event.import_id not in bridge.handled()
