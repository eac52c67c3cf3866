"""NATS 的角色：谁可以发布、收听什么，写成 nats-server 的配置。

都在一个账户里：一个 JetStream 流只属于一个账户。`etl nats-accounts` 写的用户是 nkey：那份配置里只有公钥，没有机密；内嵌的服务器上是口令。
各角色收回答的前缀不同，谁也听不到别人的。
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import indent

from bridge.nats_names import (
    DATA_IMPORT_COMPLETED,
    EVENTS_DLQ_PREFIX,
    EVENTS_DLQ_STREAM,
    EVENTS_PREFIX,
    EVENTS_STREAM,
    EVERY_ETL_COMPLETED,
    TASKS_DLQ_STREAM,
    TASKS_DLQ_SUBJECT,
    TASKS_FORGIVEN_STREAM,
    TASKS_FORGIVEN_SUBJECT,
    TASKS_STREAM,
    TASKS_SUBJECT,
)
from bridge.settings import BridgeSettings

ACCOUNT = "DAYLINE"
_API = "$JS.API."
_ANY_EVENT = EVENTS_PREFIX + ">"
_ANY_EVENT_LETTER = EVENTS_DLQ_PREFIX + ">"


@dataclass(frozen=True)
class NatsRole:
    """publish 与 subscribe 是它可以发布、收听的主题；别的都不许。"""

    name: str
    what: str
    publish: Sequence[str]
    subscribe: Sequence[str] = ()

    @property
    def inbox_prefix(self) -> str:
        return f"_INBOX_{self.name}"


def nats_roles(settings: BridgeSettings) -> tuple[NatsRole, ...]:
    """这套安装（ETL_TARGET_SCHEMA）的角色。"""
    own = settings.own_name
    tasks, task_letters, forgiven = own(TASKS_STREAM), own(TASKS_DLQ_STREAM), own(TASKS_FORGIVEN_STREAM)
    task, task_letter = f"{own(TASKS_SUBJECT)}.>", f"{own(TASKS_DLQ_SUBJECT)}.>"
    ours = (EVENTS_DLQ_STREAM, tasks, task_letters, forgiven)
    everything = (EVENTS_STREAM, *ours)
    # 告警与指标：看每个流与消费者的现状，不看内容
    looking = (
        *(f"{_API}STREAM.INFO.{stream}" for stream in everything),
        *(f"{_API}CONSUMER.{what}" for what in ("NAMES.*", "INFO.*.*")),
    )
    # STREAM.NAMES：存不进去时问一声，是没有这个流，还是没有领导者；不见了的才建回来
    answers = (f"{_API}INFO", f"{_API}STREAM.NAMES")
    rings = (*answers, *(f"{_API}STREAM.INFO.{stream}" for stream in (tasks, task_letters, forgiven)), task)
    runs = (*answers, *looking, task, EVERY_ETL_COMPLETED, f"{_API}STREAM.MSG.GET.{EVENTS_STREAM}")
    return (
        NatsRole("importer", "announces imports", [DATA_IMPORT_COMPLETED]),
        NatsRole(
            "listener",
            "listens to events, rings the workers",
            [*runs, *_making(everything, ours), *_taking(EVENTS_STREAM), _ANY_EVENT_LETTER],
        ),
        NatsRole(
            "worker",
            "takes tasks, runs them, prunes at night",
            [
                *runs,
                *_making((tasks, task_letters, forgiven), (tasks, task_letters, forgiven)),
                *_taking(tasks),
                *_reading((EVENTS_DLQ_STREAM, task_letters)),
                *(f"{_API}STREAM.PURGE.{stream}" for stream in (EVENTS_DLQ_STREAM, task_letters)),
                f"{_API}STREAM.MSG.GET.{forgiven}",
                task_letter,
                f"{own(TASKS_FORGIVEN_SUBJECT)}.>",
            ],
        ),
        NatsRole("ui", "the UI and Dagster's daemon ring the workers", rings),
        NatsRole(
            "operator",
            "the commands: status, doctor, replay, dlq, prune, withdraw",
            [
                *runs,
                *_making(everything, ours),
                *_taking(EVENTS_STREAM),
                *_taking(tasks),
                *_reading(everything),
                *(f"{_API}STREAM.{what}.{stream}" for stream in ours for what in ("PURGE", "MSG.DELETE", "MSG.GET")),
                _ANY_EVENT,
                _ANY_EVENT_LETTER,
                task_letter,
            ],
            [_ANY_EVENT],
        ),
    )


def server_config(roles: Sequence[NatsRole], public_keys: Mapping[str, str]) -> str:
    """nats-server 的一段配置，`include` 进它的；没有机密。

    :param public_keys: 角色的名字 → 它的 nkey 的公开的那一半。
    """
    users = indent("\n".join(_user(role, public_keys[role.name]) for role in roles), " " * 6)
    return (
        '# written by `etl nats-accounts`; in nats-server.conf: include "accounts.conf"\n'
        f"accounts {{\n  {ACCOUNT} {{\n    jetstream: enabled\n    users: [\n{users}\n    ]\n  }}\n}}\n"
    )


def permissions(role: NatsRole) -> dict[str, object]:
    """nats-server 的配置里一个用户的 permissions。"""
    heard = [f"{role.inbox_prefix}.>", *role.subscribe]
    return {"publish": {"allow": sorted(set(role.publish))}, "subscribe": {"allow": heard}}


def to_config(document: object) -> str:
    """nats-server 的配置语法包含 JSON，但不认 \\u：名字里有汉字，照原样写。"""
    return json.dumps(document, indent=2, ensure_ascii=False)


def _user(role: NatsRole, public_key: str) -> str:
    user = to_config({"nkey": public_key, "permissions": permissions(role)})
    return f"# {role.name}: {role.what}\n{user}"


def _making(created: Sequence[str], corrected: Sequence[str]) -> list[str]:
    """流不见了就建回来；自己的还改对。"""
    return [
        *(f"{_API}STREAM.CREATE.{stream}" for stream in created),
        *(f"{_API}STREAM.UPDATE.{stream}" for stream in corrected),
    ]


def _taking(stream: str) -> list[str]:
    """建立自己的消费者，取，确认。"""
    return [
        f"{_API}CONSUMER.DURABLE.CREATE.{stream}.*",
        f"{_API}CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
    ]


def _reading(streams: Sequence[str]) -> list[str]:
    """从头到尾读一遍：一个临时的消费者。"""
    return [f"{_API}CONSUMER.{what}.{stream}.*" for stream in streams for what in ("CREATE", "MSG.NEXT", "DELETE")]
