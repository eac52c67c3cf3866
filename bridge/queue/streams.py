"""任务队列的三个流：任务、死信、不算数的投递。"""

from __future__ import annotations

from nats.js.api import DiscardPolicy, RetentionPolicy, StreamConfig

from bridge.jetstream.dead_letters import letters_stream
from bridge.nats_names import (
    TASKS_DLQ_STREAM,
    TASKS_DLQ_SUBJECT,
    TASKS_FORGIVEN_STREAM,
    TASKS_FORGIVEN_SUBJECT,
    TASKS_STREAM,
    TASKS_SUBJECT,
)
from bridge.settings import BridgeSettings

_DAY = 86_400
_MIB = 1 << 20


def task_streams(settings: BridgeSettings) -> list[StreamConfig]:
    """任务、死信、不算数的投递。"""
    own = settings.own_name
    return [
        # 满了就拒收，不丢已有的
        StreamConfig(
            name=own(TASKS_STREAM),
            subjects=[f"{own(TASKS_SUBJECT)}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            max_bytes=256 * _MIB,
            duplicate_window=600,
        ),
        task_letters(settings),
        forgiven_deliveries(settings),
    ]


def task_letters(settings: BridgeSettings) -> StreamConfig:
    """任务的死信。"""
    return letters_stream(settings.own_name(TASKS_DLQ_STREAM), f"{settings.own_name(TASKS_DLQ_SUBJECT)}.>")


def forgiven_deliveries(settings: BridgeSettings) -> StreamConfig:
    """不算数的投递，一个任务一条。"""
    return StreamConfig(
        name=settings.own_name(TASKS_FORGIVEN_STREAM),
        subjects=[f"{settings.own_name(TASKS_FORGIVEN_SUBJECT)}.>"],
        max_msgs_per_subject=1,
        max_bytes=16 * _MIB,
        max_age=7 * _DAY,
    )
