"""应用自己的 EVENTS：守不住的拒绝，打了折扣的说一声，好的不说。"""

from __future__ import annotations

from typing import Any

import pytest

from bridge.events.adopted_stream import shortcomings
from bridge.events.streams import events_stream
from bridge.settings import BridgeSettings

HOUR = 3_600 * 10**9
# 服务器说的一个流：`nats stream add EVENTS --subjects 'events.>' --defaults`
ORDINARY: dict[str, Any] = {
    "name": "EVENTS",
    "subjects": ["events.>"],
    "retention": "limits",
    "max_consumers": -1,
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "discard": "old",
    "storage": "file",
    "num_replicas": 1,
    "duplicate_window": 120 * 10**9,
    "sealed": False,
    "consumer_limits": {},
}


def found(**changes: object) -> list[tuple[bool, str]]:
    return [
        (each.is_refused, f"{each.problem}; {each.remedy}")
        for each in shortcomings({**ORDINARY, **changes}, subjects=4)
    ]


def test_ordinary_stream_and_our_own_keep_the_promise() -> None:
    assert found() == []
    assert (
        found(**{**events_stream(BridgeSettings(nats_url="")).as_dict(), "retention": "limits", "storage": "file"})
        == []
    )
    assert shortcomings({}, subjects=4) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_msgs_per_subject": 1}, "it keeps 1 messages per subject, and the events of all imports have one subject"),
        ({"max_age": HOUR // 6}, "its events are gone after 0:10:00, handled or not; `nats stream edit EVENTS --max-age=30d`"),
        ({"consumer_limits": {"max_ack_pending": 1_000}}, "its consumers may hold 1,000 unacknowledged messages, ours 100,000"),
        ({"no_ack": True}, "it acknowledges nothing, so nobody knows that an event is stored"),
        ({"sealed": True}, "it is sealed and takes no event any more"),
        ({"max_consumers": 3}, "it allows 3 consumers, we need 4"),
    ],
    ids=str,
)  # fmt: skip
def test_stream_that_cannot_keep_the_promise_is_refused(changes: dict[str, object], said: str) -> None:
    (is_refused, sentence) = found(**changes)[0]
    assert is_refused
    assert sentence.startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retention": "interest"}, "it drops what is published while our consumers are not there"),
        ({"retention": "workqueue"}, "it deletes what is handled, so that `etl replay`"),
        ({"max_bytes": 1 << 30}, "when it is full it throws away its oldest events, handled or not"),
        ({"max_msgs": 77}, "when it is full it throws away its oldest events, handled or not"),
        ({"max_msgs_per_subject": 100_000}, "when it is full it throws away its oldest events, handled or not"),
        ({"max_age": 2 * HOUR}, "its events are gone after 2:00:00, handled or not"),
        ({"consumer_limits": {"inactive_threshold": HOUR}}, "it removes our consumers when no listener has run for 1:00:00"),
        ({"storage": "memory"}, "it is in memory and empty after the server was restarted"),
    ],
    ids=str,
)  # fmt: skip
def test_stream_that_keeps_most_of_the_promise_is_warned_of(changes: dict[str, object], said: str) -> None:
    ((is_refused, sentence),) = found(**changes)
    assert not is_refused
    assert sentence.startswith(said)


def test_limits_that_refuse_what_is_new_lose_nothing() -> None:
    assert found(max_bytes=1 << 30, max_msgs=77, discard="new") == []
    assert found(max_msgs_per_subject=100_000, discard="new", discard_new_per_subject=True) == []


def test_what_is_refused_is_said_first() -> None:
    assert [is_refused for is_refused, _ in found(retention="interest", max_msgs_per_subject=1)] == [True, False]
