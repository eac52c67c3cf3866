"""流与消费者：我们自己的建好、改对，别人的只看；各有多少。"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nats.js.errors
from nats.js.api import ConsumerConfig, ConsumerInfo, StreamConfig, StreamState

from bridge.errors import StreamConflictError, StreamMissingError
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.server_errors import NAME_IN_USE

NEARLY_FULL = 0.8


@dataclass(frozen=True)
class StreamUse:
    """一个流的现状。"""

    messages: int
    share: float
    """占了上限（字节或条数，取多的）的几成；没有上限是零。"""
    has_one_copy: bool
    """服务器是集群，它却只在一个节点上。"""


async def ensure_stream(connection: JetStreamConnection, config: StreamConfig) -> None:
    """我们自己的流：没有就建，有就只改对错攸关的；大小、副本、安置归运维，改了的不改回去。"""
    name = str(config.name)
    with connection.managing(name):
        if existing := await _found_or_created(connection, config):
            corrected = corrected_config(existing, config)
            if corrected != existing:
                await connection.ask(f"STREAM.UPDATE.{name}", corrected)


async def store(
    connection: JetStreamConnection,
    config: StreamConfig,
    subject: str,
    data: bytes,
    *,
    message_id: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """存进我们自己的一个流；它不见了就建回来。"""
    try:
        await connection.publish(subject, data, message_id=message_id, headers=headers)
    except StreamMissingError:
        await ensure_stream(connection, config)
        await connection.publish(subject, data, message_id=message_id, headers=headers)


async def adopt_stream(
    connection: JetStreamConnection, config: StreamConfig, subjects: Sequence[str]
) -> dict[str, Any] | None:
    """别人的流：只在没有时建，从不修改；它不收我们要的主题就报错。返回已有的配置，刚建的是 None。"""
    name = str(config.name)
    with connection.managing(name):
        existing = await _found_or_created(connection, config)
    if existing is None:
        return None
    stored = existing.get("subjects") or []
    missing = _not_covered(subjects, stored)
    if missing:
        raise StreamConflictError(
            name,
            f"it stores {', '.join(stored) or 'no subjects'}, which does not cover {', '.join(missing)}",
            f"add these subjects to it (`nats stream edit {name}`)",
        )
    return existing


async def _found_or_created(connection: JetStreamConnection, config: StreamConfig) -> dict[str, Any] | None:
    """已有的流现在的配置；None 表示没有，刚建了。别的进程抢先建好的也是已有的。"""
    name = str(config.name)
    if existing := await stream_config(connection, name):
        return existing
    try:
        await connection.ask(
            f"STREAM.CREATE.{name}", config.evolve(num_replicas=connection.settings.nats_replicas).as_dict()
        )
    except nats.js.errors.APIError as error:
        if error.err_code != NAME_IN_USE:
            raise
        return await stream_config(connection, name)
    return None


async def ensure_consumer(connection: JetStreamConnection, stream: str, config: ConsumerConfig) -> ConsumerInfo:
    """建立一个拉取消费者；已有的照 config 改，从哪里开始读的不动（服务器也不许动）。"""
    with connection.managing(stream):
        if config.durable_name is None:
            return await _create_consumer(connection, stream, config)
        existing = await consumer_info(connection, stream, config.durable_name)
        if existing is None:
            with contextlib.suppress(nats.js.errors.BadRequestError, nats.js.errors.ServerError):
                return await _create_consumer(connection, stream, config)
            # 两个进程同时建，起点算得不一样：以先建好的为准；不是这回事，下面再错一次
            existing = await consumer_info(connection, stream, config.durable_name)
        begun = existing.config if existing else config
        return await _create_consumer(
            connection,
            stream,
            config.evolve(
                deliver_policy=begun.deliver_policy,
                opt_start_seq=begun.opt_start_seq,
                opt_start_time=begun.opt_start_time,
            ),
        )


async def _create_consumer(connection: JetStreamConnection, stream: str, config: ConsumerConfig) -> ConsumerInfo:
    where = (
        f"DURABLE.CREATE.{stream}.{config.durable_name}" if config.durable_name else f"CREATE.{stream}.{config.name}"
    )
    answer = await connection.ask(f"CONSUMER.{where}", {"stream_name": stream, "config": config.as_dict()})
    return _parse_consumer_info(answer)


async def consumer_info(connection: JetStreamConnection, stream: str, consumer: str) -> ConsumerInfo | None:
    """消费者的现状；没有这个流或消费者就是 None。"""
    answer = await ask_about(connection, stream, f"CONSUMER.INFO.{stream}.{consumer}")
    return None if answer is None else _parse_consumer_info(answer)


async def stream_consumers(connection: JetStreamConnection, stream: str) -> list[str]:
    """这个流的消费者；没有这个流就是空的。"""
    answer = await ask_about(connection, stream, f"CONSUMER.NAMES.{stream}")
    return [] if answer is None else answer["consumers"] or []


async def stream_config(connection: JetStreamConnection, name: str) -> dict[str, Any] | None:
    """服务器那里的配置，一个字段不少（nats-py 丢掉它不认识的）；没有这个流就是 None。"""
    info = await _stream_info(connection, name)
    return None if info is None else info["config"]


async def stream_state(connection: JetStreamConnection, name: str) -> StreamState | None:
    """流里有多少、从几号到几号；没有这个流就是 None。"""
    info = await _stream_info(connection, name)
    return None if info is None else StreamState.from_response(info["state"])


async def stream_use(connection: JetStreamConnection, name: str) -> StreamUse | None:
    """流里有多少、占了上限的几成；没有这个流就是 None。"""
    info = await _stream_info(connection, name)
    if info is None:
        return None
    state, config = info["state"], info["config"]
    shares = [
        state[held] / config[limit]
        for held, limit in (("bytes", "max_bytes"), ("messages", "max_msgs"))
        if config[limit] > 0
    ]
    is_clustered = bool(info.get("cluster", {}).get("name"))
    return StreamUse(state["messages"], max(shares, default=0.0), is_clustered and config["num_replicas"] == 1)


async def subject_counts(connection: JetStreamConnection, stream: str, subjects: str) -> dict[str, int]:
    """流里这些主题（可含通配符）各有几条，做着的也算；没有这个流就是空的。"""
    # 一个主题一个计数，由服务器数：不必读消息
    info = await _stream_info(connection, stream, {"subjects_filter": subjects})
    return {} if info is None else info["state"].get("subjects") or {}


async def _stream_info(
    connection: JetStreamConnection, name: str, content: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    return await ask_about(connection, name, f"STREAM.INFO.{name}", content)


async def ask_about(
    connection: JetStreamConnection, stream: str, what: str, content: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """问一个流、它的消费者或消息；没有这样东西是 None。"""
    with connection.managing(stream):
        try:
            return await connection.ask(what, content)
        except nats.js.errors.NotFoundError:
            return None


def corrected_config(existing: Mapping[str, Any], wanted: StreamConfig) -> dict[str, Any]:
    """已有的配置，只改对错攸关的：收我们的主题、保留方式、满了拒收、去重的时间够长、不该过期的不过期。

    从服务器给的原样改起：大小、副本、压缩、安置、镜像、我们不认识的字段都照旧。
    """
    ours = wanted.as_dict()
    subjects, stored = wanted.subjects or [], existing.get("subjects") or []
    max_age = existing.get("max_age", 0) if wanted.max_age else 0
    corrected = dict(existing) | {
        "max_age": max_age,
        "discard": ours["discard"],
        "retention": ours.get("retention", "limits"),
    }
    if _not_covered(subjects, stored):
        corrected["subjects"] = [*subjects, *_not_covered(stored, subjects)]
    # 去重的窗口不能比消息活得久：max_age 更短的流，照我们的长度改，服务器不收
    window = int(wanted.duplicate_window * 1e9)
    corrected["duplicate_window"] = max(
        existing.get("duplicate_window", 0), min(window, max_age) if max_age else window
    )
    return corrected


def _not_covered(subjects: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [subject for subject in subjects if not any(subject_covers(pattern, subject) for pattern in patterns)]


def subject_covers(pattern: str, subject: str) -> bool:
    """流的主题模式（含 * 与 >）是否包括这个主题。"""
    wanted = pattern.split(".")
    given = subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(token in ("*", part) for token, part in zip(wanted, given, strict=True))


def _parse_consumer_info(answer: dict[str, Any]) -> ConsumerInfo:
    info: ConsumerInfo = ConsumerInfo.from_response(answer)
    return info
