"""应用自己的 EVENTS 守不守得住我们答应的（一个导入也不丢）：守不住的拒绝，打了折扣的说一声。只看，从不改。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from bridge.nats_names import EVENTS_STREAM

MAX_ACK_PENDING = 100_000
"""没确认的这么多，服务器就不再给；推迟的也算：死信流满时推迟的不能挡住好的。等着导入的事件记在台账里，不在其中。"""
FEWEST_PER_SUBJECT = 1_000
"""所有导入的事件是同一个主题：一个主题留得比这还少，忙一点就挤掉没处理的。"""
SHORTEST_AGE = timedelta(hours=1)
SHORT_AGE = timedelta(days=1)

Stored = Mapping[str, Any]


@dataclass(frozen=True)
class Shortcoming:
    """守不住的一处。"""

    problem: str
    remedy: str
    is_refused: bool = False


def shortcomings(stored: Stored, *, subjects: int) -> list[Shortcoming]:
    """要拒绝的在前。

    :param stored: 流的配置，服务器给的原样。
    :param subjects: 我们读几个主题，一个主题一个消费者。
    """
    consumers = stored.get("max_consumers", -1)
    found = [found for judge in _JUDGES if (found := judge(stored))]
    if 0 < consumers < subjects:
        found.append(_refused(f"it allows {consumers} consumers, we need {subjects}", "max-consumers=-1"))
    return sorted(found, key=lambda each: not each.is_refused)


def _per_subject(stored: Stored) -> Shortcoming | None:
    kept = stored.get("max_msgs_per_subject", -1)
    if not 0 < kept < FEWEST_PER_SUBJECT:
        return None
    problem = f"it keeps {kept} messages per subject, and the events of all imports have one subject"
    return _refused(problem, "max-msgs-per-subject=-1")


def _age(stored: Stored) -> Shortcoming | None:
    age = timedelta(microseconds=stored.get("max_age", 0) // 1_000)
    if not timedelta() < age < SHORT_AGE:
        return None
    problem = f"its events are gone after {age}, handled or not"
    return _refused(problem, "max-age=30d") if age < SHORTEST_AGE else _weak(problem, "max-age=30d")


def _unacknowledged(stored: Stored) -> Shortcoming | None:
    limit = (stored.get("consumer_limits") or {}).get("max_ack_pending", 0)
    if not 0 < limit < MAX_ACK_PENDING:
        return None
    problem = f"its consumers may hold {limit:,} unacknowledged messages, ours {MAX_ACK_PENDING:,}"
    return Shortcoming(problem, "raise max_ack_pending of its consumer_limits", is_refused=True)


def _closed(stored: Stored) -> Shortcoming | None:
    if stored.get("no_ack"):
        return _refused("it acknowledges nothing, so nobody knows that an event is stored", "ack")
    if stored.get("sealed"):
        return Shortcoming("it is sealed and takes no event any more", "make a new one", is_refused=True)
    return None


def _retention(stored: Stored) -> Shortcoming | None:
    match stored.get("retention"):
        case "interest":
            problem = "it drops what is published while our consumers are not there (before the first `etl listen`, or after they were removed)"
        case "workqueue":
            problem = (
                "it deletes what is handled, so that `etl replay` and another target (ETL_TARGET_SCHEMA) find nothing"
            )
        case _:
            return None
    return Shortcoming(problem, "make it with limits retention when you can")


def _discard(stored: Stored) -> Shortcoming | None:
    """一个主题的上限不管 discard：不另外写明，挤掉的总是旧的。"""
    is_full_once = stored.get("discard") == "old" and max(stored.get("max_bytes", -1), stored.get("max_msgs", -1)) > 0
    is_crowded = (
        not stored.get("discard_new_per_subject") and stored.get("max_msgs_per_subject", -1) >= FEWEST_PER_SUBJECT
    )
    if not is_full_once and not is_crowded:
        return None
    option = "discard=new" if is_full_once else "max-msgs-per-subject=-1"
    return _weak("when it is full it throws away its oldest events, handled or not", option)


def _consumers_end(stored: Stored) -> Shortcoming | None:
    if not (threshold := (stored.get("consumer_limits") or {}).get("inactive_threshold", 0)):
        return None
    pause = timedelta(microseconds=threshold // 1_000)
    problem = (
        f"it removes our consumers when no listener has run for {pause}, its events are then read again from the first"
    )
    return Shortcoming(problem, "unset inactive_threshold of its consumer_limits")


def _storage(stored: Stored) -> Shortcoming | None:
    if stored.get("storage") != "memory":
        return None
    return Shortcoming("it is in memory and empty after the server was restarted", "make it with file storage")


def _refused(problem: str, option: str) -> Shortcoming:
    return Shortcoming(problem, _edit(option), is_refused=True)


def _weak(problem: str, option: str) -> Shortcoming:
    return Shortcoming(problem, _edit(option))


def _edit(option: str) -> str:
    return f"`nats stream edit {EVENTS_STREAM} --{option}`"


_JUDGES: tuple[Callable[[Stored], Shortcoming | None], ...] = (
    _per_subject,
    _age,
    _unacknowledged,
    _closed,
    _retention,
    _discard,
    _consumers_end,
    _storage,
)
