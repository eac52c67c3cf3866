"""桥的设置：NATS、事件监听、任务队列；与 etl_assets 的设置同样从 ETL_* 与 .env 读取一次。"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from etl_assets.core.backoff import Backoff
from etl_assets.core.settings import read_settings

Lane = Literal["interactive", "event", "bulk"]
LANES: tuple[Lane, ...] = get_args(Lane)
"""任务的车道，先执行的在前：人的点击、事件、回填。"""
WorkerLane = Literal["interactive", "small", "event", "bulk"]
"""工人服务的车道；small 是事件车道里只有几次小导入的日子：留给人点击的工人闲着时顺手做，人不必等。"""

_SCHEMES = ("nats", "tls", "ws", "wss")
_MAIN_SCHEMA = "public"


class BridgeSettings(BaseSettings):
    """事件与任务一侧的设置。"""

    model_config = SettingsConfigDict(env_prefix="ETL_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    target_schema: str = Field(default=_MAIN_SCHEMA, min_length=1, max_length=63, description="as for the data side: names the queues, too")
    nats_url: str = Field(default="", description="URL of the NATS server, or of a cluster's servers separated by commas")
    nats_replicas: int = Field(default=1, ge=1, le=5, description="copies of each stream that we create: 3 on a cluster of three or more")
    connect_timeout_seconds: int = Field(default=5, ge=1, le=300)

    event_max_bytes: int = Field(default=262_144, ge=65_536, le=67_108_864, description="a larger event is dead-lettered unread")
    event_retry_seconds: int = Field(default=3_600, ge=1, le=604_800, description="how long an event of a missing import is tried again")
    event_retry_delay_seconds: float = Field(default=1.0, gt=0, le=3_600, description="first delay, doubled each time")
    event_retry_delay_max_seconds: float = Field(default=60.0, gt=0, le=3_600)
    event_max_attempts: int = Field(default=5, ge=1, le=1_000, description="deliveries of an event that its handler cannot digest")
    event_ack_wait_seconds: float = Field(default=30.0, ge=0.5, le=3_600, description="a silent listener's events go to another after this")
    listener_batch_size: int = Field(default=1_000, ge=1, le=10_000)
    listener_batch_milliseconds: int = Field(default=1, ge=0, le=10_000, description="how long a batch waits for company")

    task_ack_wait_seconds: float = Field(default=30.0, ge=0.5, le=3_600, description="a silent worker's tasks go to another after this")
    task_max_attempts: int = Field(default=5, ge=1, le=1_000)
    worker_lanes: Annotated[tuple[WorkerLane, ...], NoDecode] = Field(
        default=LANES, min_length=1, description="lanes that a worker serves; small: of the events only days that are done in no time"
    )
    ui_hosts: Annotated[tuple[str, ...], NoDecode] = Field(default=(), description="host names of reverse proxies before the UI")
    lease_seconds: int = Field(default=10, ge=3, le=3_600, description="a silent worker's run goes to another after this")
    cancel_grace_seconds: float = Field(
        default=10.0, ge=0.1, le=3_600, description="a cancelled run that is not over by then loses its process"
    )

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
        return _split(self.nats_url)

    @property
    def nats_login(self) -> dict[str, Any]:
        """URL 里的用户与口令，或令牌：集群告诉客户端的别的节点，地址里没有它们，重连过去就会被拒。"""
        logins = {(parts.username, parts.password) for parts in map(urlsplit, self.nats_servers) if parts.username}
        if len(logins) != 1:
            return {}
        ((user, password),) = logins
        return {"token": str(user)} if password is None else {"user": str(user), "password": password}

    @property
    def nats_address(self) -> str:
        """给日志与错误看的地址：没有用户、口令与令牌。"""
        parts = [urlsplit(server) for server in self.nats_servers]
        return ",".join(f"{part.scheme}://{part.hostname}:{part.port or 4222}" for part in parts)


def _split(value: str) -> list[str]:
    return [part for piece in value.split(",") if (part := piece.strip())]


@lru_cache(maxsize=1)
def get_bridge_settings() -> BridgeSettings:
    """本进程的设置；第一次调用时读取。"""
    return read_settings(BridgeSettings)
