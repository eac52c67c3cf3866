"""ETL 的设置：一个冻结的、有类型的对象，启动时从环境变量 ETL_* 与 .env 读取一次。"""

from __future__ import annotations

import re
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from etl_assets.core.errors import SettingsError
from etl_assets.core.secret_files import SecretFileSource
from etl_assets.core.text import WHITE_SPACE

AnySettings = TypeVar("AnySettings", bound=BaseSettings)
# NoDecode：pydantic-settings 缺省把元组的环境变量当 JSON 读，逗号分隔的就不收
StatusList = Annotated[tuple[str, ...], NoDecode]


@lru_cache(maxsize=32)
def is_time_zone(name: str) -> bool:
    """localtime 与 Factory 是机器自己的文件，Polars 不认。找一遍要走遍时区的文件夹，所以记着。"""
    return name in available_timezones() - {"localtime", "Factory"}


class EnvironmentSettings(BaseSettings):
    """环境变量 ETL_*，其次 .env，其次机密的文件（ETL_…_FILE）。"""

    model_config = SettingsConfigDict(
        env_prefix="ETL_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic 规定的签名
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if not isinstance(env_settings, EnvSettingsSource) or not isinstance(dotenv_settings, DotEnvSettingsSource):
            raise TypeError("pydantic-settings reads the environment in another way than this version expects")
        files = SecretFileSource(settings_cls, env_settings, dotenv_settings)
        return init_settings, env_settings, dotenv_settings, files


class EtlSettings(EnvironmentSettings):
    """数据一侧的设置；DOMAIN 规则里点名的都在这里。"""

    database_url: str = Field(
        default="",
        repr=False,
        description="PostgreSQL that holds `raw_orders`: `postgresql://user:password@host:5432/name`; "
        "`etl up` starts one of its own when it is empty",
    )
    target_schema: str = Field(
        default="public",
        min_length=1,
        max_length=63,
        description="schema of `orders`, `customers`, `business_leads`; `etl init-db` creates them; "
        "each schema has a ledger and queues of its own",
    )
    rollout: Annotated[int | tuple[str, ...], NoDecode] = Field(
        default=100,
        description="the share of the customers that is written: `10%`, or names of shops separated by commas; "
        "see [rollout](../rollout.md)",
    )
    timezone: str = Field(
        default="Asia/Shanghai",
        description="time zone of the business day, and of times without a zone in imported files; area and city, "
        "such as `Europe/Berlin`: names that PostgreSQL and Python read differently (`CET`, `MET`, `EET`, `WET`) "
        "are refused",
    )
    partitions_start: date = Field(
        default=date(2000, 1, 1),
        ge=date(1900, 1, 1),
        description="first business day; unless it is set, the UI of the stack begins with the year of the oldest data",
    )
    shown_since: date | None = Field(
        default=None, description="first day that the UI shows; the stack's code server sets it for itself, nobody else"
    )
    cancelled_statuses: StatusList = Field(
        default=(
            *("cancelled", "canceled", "closed", "refunded", "已取消", "已关闭", "已退款"),
            *("交易关闭", "交易取消", "退款成功", "voided", "wc-cancelled", "wc-refunded"),  # 各平台自己的叫法
        ),
        description="orders that do not count; compared trimmed and case-folded",
    )
    completed_statuses: StatusList = Field(
        default=("completed", "delivered", "交易成功", "已完成"),
        description="a `BULK` order in one of these wins its lead",
    )
    cold_after_days: int = Field(
        default=90,
        ge=1,
        le=36500,
        description="an open lead is `COLD` when its last order is this many days older than the newest order",
    )
    max_delete_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="share of a range's orders that one run may delete; none of a shop that `shop_configs` "
        "no longer knows",
    )
    unannounced_after_seconds: int = Field(
        default=60, ge=1, le=86_400, description="a completed import that no event announced is taken in after this"
    )
    retention_ledger_days: int = Field(
        default=90,
        ge=1,
        le=36_500,
        description="how long the ledger remembers which import asked for which days; never shorter than its event "
        "is in the stream, or a day is not done",
    )
    pool_size: int = Field(
        default=5, ge=1, le=100, description="connections that a process keeps; as many again under load"
    )
    connect_timeout_seconds: int = Field(default=5, ge=1, le=300, description="to PostgreSQL and to NATS")
    statement_timeout_seconds: int = Field(
        default=600, ge=1, le=86400, description="one SQL statement (the COPY of an import excepted)"
    )
    lock_timeout_seconds: int = Field(
        default=60,
        ge=1,
        le=3600,
        description="waiting for rows of another run, or for a person who is changing leads",
    )
    idle_transaction_timeout_seconds: int = Field(
        default=60,
        ge=1,
        le=3600,
        description="the server ends a transaction that is idle this long; one whose run is reading or computing "
        "elsewhere is not idle",
    )

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        if not is_time_zone(value):
            raise ValueError("must be an IANA time zone name such as Asia/Shanghai or UTC")
        return value

    @field_validator("rollout", mode="before")
    @classmethod
    def _parse_rollout(cls, value: Any) -> Any:
        """`10%` 变成 10，逗号分隔的店名变成元组；不带百分号的 10 多半是忘了写，不当店名。"""
        if not isinstance(value, str):
            return value
        text = value.strip(WHITE_SPACE)
        if percent := re.fullmatch(r"(100|[1-9][0-9]?)\s*%", text):
            return int(percent[1])
        shops = tuple(dict.fromkeys(name.strip(WHITE_SPACE) for name in text.split(",")))
        if "%" in text or "" in shops or re.fullmatch(r"[-+]?([0-9]{1,3}|[0-9]*[.][0-9]+)", text):
            raise ValueError("must be a whole percentage from 1% to 100%, or names of shops separated by commas")
        return shops

    @field_validator("cancelled_statuses", "completed_statuses", mode="before")
    @classmethod
    def _split_statuses(cls, value: Any) -> Any:
        """环境变量里是逗号分隔的一行；比较时两边都修剪并 casefold。"""
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(folded for part in parts if (folded := part.strip(WHITE_SPACE).casefold()))

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    def today(self) -> date:
        """业务时区里的今天，也就是最后一个分区。"""
        return datetime.now(self.zone).date()


def read_settings(kind: type[AnySettings]) -> AnySettings:
    """读环境变量；第一个不合格的值变成一句 SettingsError（变量名、允许的值），不回显可能是机密的值。"""
    try:
        return kind()
    except ValidationError as error:
        problem = error.errors(include_input=True)[0]
        field = str(problem["loc"][0]) if problem["loc"] else "?"
        name = f"ETL_{field.upper()}"
        is_secret = field in kind.model_fields and not kind.model_fields[field].repr
        shown = "***" if is_secret else repr(problem.get("input"))
        message = problem["msg"].removeprefix("Value error, ")
        raise SettingsError(
            f"{name}={shown} is not usable: {message}; correct it in the environment or in .env"
        ) from error


@lru_cache(maxsize=1)
def get_settings() -> EtlSettings:
    """本进程的设置；第一次调用时读取。"""
    return read_settings(EtlSettings)
