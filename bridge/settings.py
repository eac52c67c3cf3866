"""桥的设置：NATS、事件监听、任务队列；与 etl_assets 的设置同样从 ETL_* 与 .env 读取一次。"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode, PydanticBaseSettingsSource

from bridge.nats_context import NatsContextSource
from etl_assets.core.backoff import Backoff
from etl_assets.core.settings import EnvironmentSettings, read_settings

Lane = Literal["interactive", "event", "bulk"]
LANES: tuple[Lane, ...] = get_args(Lane)
"""任务的车道，先执行的在前：人的点击、事件、回填。"""
WorkerLane = Literal["interactive", "small", "event", "bulk"]
"""工人服务的车道；small 是事件车道里只有几次小导入的日子：留给人点击的工人闲着时顺手做，人不必等。"""

_SCHEMES = ("nats", "tls", "ws", "wss")
_MAIN_SCHEMA = "public"
_BETWEEN_URLS = re.compile(r"[\s,]+(?=[A-Za-z0-9]+://)")


class BridgeSettings(EnvironmentSettings):
    """事件与任务一侧的设置。"""

    target_schema: str = Field(
        default=_MAIN_SCHEMA, min_length=1, max_length=63, description="as for the data side: names the queues, too"
    )
    nats_url: str = Field(
        default="",
        repr=False,
        description="NATS server, or a cluster's servers separated by commas: `nats://user:password@host:4222`; "
        "`etl up` starts one of its own when it is empty",
    )
    nats_context: str = Field(default="", description="context of the `nats` command line: what is not set here is its")
    nats_user: str = Field(default="", description="user, if the address does not name one")
    nats_password: str = Field(default="", repr=False, description="its password, of any characters; secret")
    nats_token: str = Field(default="", repr=False, description="token instead of user and password; secret")
    nats_creds: Path | None = Field(default=None, description="credentials file (JWT and seed)")
    nats_nkey: Path | None = Field(default=None, description="file with the seed of an nkey")
    nats_ca: Path | None = Field(default=None, description="who signed the server's certificate, if not a public one")
    nats_cert: Path | None = Field(default=None, description="client certificate, for mutual TLS")
    nats_key: Path | None = Field(default=None, description="its private key")
    nats_tls_first: bool = Field(default=False, description="TLS before the server says a word")
    nats_inbox_prefix: str = Field(
        default="_INBOX",
        pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$",
        description="where answers are sent to: one per role, and no role reads another's",
    )
    nats_replicas: int = Field(
        default=1,
        ge=1,
        le=5,
        description="copies of each stream that we create: `3` on a cluster of three nodes or more; "
        "streams that exist stay as they are",
    )
    connect_timeout_seconds: int = Field(default=5, ge=1, le=300, description="to PostgreSQL and to NATS")

    event_max_bytes: int = Field(
        default=262_144,
        ge=65_536,
        le=67_108_864,
        description="a larger event is refused by the publisher and the stream, or dead-lettered unread; "
        "our own completion events need the lower bound",
    )
    event_retry_seconds: int = Field(
        default=3_600, ge=1, le=604_800, description="how long an event of a missing or pending import waits for it"
    )
    event_retry_delay_seconds: float = Field(
        default=1.0,
        gt=0,
        le=3_600,
        description="first delay before such an event is looked at again, doubled each time",
    )
    event_retry_delay_max_seconds: float = Field(default=60.0, gt=0, le=3_600, description="longest such delay")
    event_max_attempts: int = Field(
        default=5,
        ge=1,
        le=1_000,
        description="times that the handler fails on an event by itself, until it goes to `EVENTS_DLQ`; "
        "what a server refuses is not counted",
    )
    event_ack_wait_seconds: float = Field(
        default=30.0, ge=0.5, le=3_600, description="a silent listener's events go to another after this"
    )
    listener_batch_size: int = Field(
        default=1_000, ge=1, le=10_000, description="events handled in one database transaction"
    )
    listener_batch_milliseconds: int = Field(
        default=1, ge=0, le=10_000, description="how long a batch waits for company"
    )

    task_ack_wait_seconds: float = Field(
        default=30.0, ge=0.5, le=3_600, description="a silent worker's task goes to another after this"
    )
    task_max_attempts: int = Field(
        default=5, ge=1, le=1_000, description="attempts of a task before it goes to `TASKS_DLQ`"
    )
    worker_lanes: Annotated[tuple[WorkerLane, ...], NoDecode] = Field(
        default=LANES,
        min_length=1,
        description="lanes that a worker serves; `small` instead of `event`: of the events only days of a few "
        "small imports",
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65_535,
        description="port on which a host answers Prometheus, `0` is off; see [metrics](../metrics.md)",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address that the metrics are served on; there is no password before it",
    )
    ui_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="host names of reverse proxies before the stack's UI, separated by commas; without them it answers "
        "to `127.0.0.1` and `localhost`",
    )
    ui_read_only: bool = Field(default=False, description="the UI only shows: nothing is launched, cancelled, deleted")
    lease_seconds: int = Field(
        default=10, ge=3, le=3_600, description="a silent worker's run goes to another after this"
    )
    cancel_grace_seconds: float = Field(
        default=10.0,
        ge=0.1,
        le=3_600,
        description="a cancelled run that is not over by then loses its worker process",
    )

    retention_runs_days: int = Field(
        default=30,
        ge=1,
        le=36_500,
        description="Dagster's runs, their logs, ticks of sensors and schedules are kept this long after they ended; "
        "the newest materialization of each partition stays",
    )
    retention_dead_letters_days: int = Field(
        default=365,
        ge=1,
        le=36_500,
        description="a dead letter that nobody retried or dropped is kept this long",
    )

    alert_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        repr=False,
        description="who is told what is wrong, as apprise writes addresses, separated by blanks; secret; "
        "see [alerts](../alerts.md)",
    )
    alert_language: Literal["zh", "en"] = Field(default="zh", description="language of the messages")
    alert_lag_seconds: int = Field(
        default=900, ge=1, le=604_800, description="a day that is due for longer than this is wrong"
    )
    alert_fresh_hours: int = Field(
        default=0,
        ge=0,
        le=8_760,
        description="so is an asset of which nothing was made for this long; `0`: never",
    )

    @classmethod
    def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        return (*super().settings_customise_sources(*args, **kwargs), NatsContextSource(cls))

    @field_validator(
        *("nats_creds", "nats_nkey", "nats_ca", "nats_cert", "nats_key", "nats_tls_first", "nats_inbox_prefix"),
        mode="before",
    )
    @classmethod
    def _empty_is_default(cls, value: Any, info: ValidationInfo) -> Any:
        """空的变量就是没有设；栈用它盖住别处的登录。"""
        return value or cls.model_fields[str(info.field_name)].default

    @field_validator("nats_url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        for server in _split(value):
            try:
                parts = urlsplit(server)
                usable = parts.scheme in _SCHEMES and bool(parts.hostname) and (parts.port or 1) > 0
            except ValueError:
                usable = False
            if not usable:
                raise ValueError("must look like nats://user:password@host:4222")
        return value

    @field_validator("worker_lanes", "ui_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        return tuple(_split(value)) if isinstance(value, str) else value

    @field_validator("alert_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        """空白或逗号隔开；地址里面也可以有逗号，所以看后面是不是另一个地址的开头。"""
        if not isinstance(value, str):
            return value
        return tuple(url for piece in _BETWEEN_URLS.split(value) if (url := piece.strip(" \t\n,")))

    @field_validator("ui_hosts")
    @classmethod
    def _bare_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in value):
            raise ValueError("must be host names without scheme and port, such as dagster.example.com")
        return value

    def own_name(self, name: str) -> str:
        """这套安装自己的流、消费者、主题的名字：影子（ETL_TARGET_SCHEMA）用同一台 NATS，事件两边都收到，任务互不相干。

        schema 名里 NATS 不许的字符换成下划线、太长的截短，再加一段散列，两个名字才不会变成同一个。
        """
        schema = self.target_schema
        if schema == _MAIN_SCHEMA:
            return name
        allowed = re.sub(r"[^A-Za-z0-9_]", "_", schema)[:40]
        digest = hashlib.sha256(schema.encode()).hexdigest()[:8]
        return f"{name}-{allowed}" if allowed == schema else f"{name}-{allowed}-{digest}"

    @property
    def event_backoff(self) -> Backoff:
        """没做成的事件、还没完成的导入，隔多久再看。"""
        return Backoff(self.event_retry_delay_seconds, self.event_retry_delay_max_seconds)

    @property
    def nats_servers(self) -> list[str]:
        """各个节点，登录的也许写在里面：连接用 bridge.jetstream.login。"""
        return _split(self.nats_url)

    @property
    def nats_address(self) -> str:
        """给日志与错误看的地址：没有用户、口令与令牌。"""
        parts = [urlsplit(server) for server in self.nats_servers]
        return ",".join(f"{part.scheme}://{part.hostname}:{part.port or 4222}" for part in parts)


_OTHER_LOGINS = (
    "context",
    "user",
    "password",
    "token",
    "creds",
    "nkey",
    "ca",
    "cert",
    "key",
    "tls_first",
    "inbox_prefix",
)
LOGIN_VARIABLES = tuple(f"ETL_NATS_{name.upper()}" for name in _OTHER_LOGINS)
"""地址以外，怎样登录 NATS 的那些变量。"""


def _split(value: str) -> list[str]:
    return [part for piece in value.split(",") if (part := piece.strip())]


@lru_cache(maxsize=1)
def get_bridge_settings() -> BridgeSettings:
    """本进程的设置；第一次调用时读取。"""
    return read_settings(BridgeSettings)
