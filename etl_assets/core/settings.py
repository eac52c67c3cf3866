"""ETL 的设置：一个冻结的、有类型的对象，启动时从环境变量 ETL_* 与 .env 读取一次。"""

from __future__ import annotations

import re
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from etl_assets.core.errors import SettingsError
from etl_assets.core.text import WHITE_SPACE

AnySettings = TypeVar("AnySettings", bound=BaseSettings)
StatusList = Annotated[tuple[str, ...], NoDecode]


class EtlSettings(BaseSettings):
    """数据一侧的设置；DOMAIN 规则里点名的都在这里。"""

    model_config = SettingsConfigDict(env_prefix="ETL_", env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: str = Field(default="", repr=False, description="SQLAlchemy or libpq URL of the PostgreSQL that holds raw_orders")
    target_schema: str = Field(
        default="public",
        min_length=1,
        max_length=63,
        description="schema of the result tables: orders, customers, business_leads and what else there is",
    )
    rollout: Annotated[int | tuple[str, ...], NoDecode] = Field(default=100, description="percent of the customers, or names of shops")
    timezone: str = Field(default="Asia/Shanghai", description="IANA time zone of the business day")
    partitions_start: date = Field(default=date(2000, 1, 1), ge=date(1900, 1, 1), description="first daily partition")
    cancelled_statuses: StatusList = (
        *("cancelled", "canceled", "closed", "refunded", "已取消", "已关闭", "已退款"),
        *("交易关闭", "交易取消", "退款成功", "voided", "wc-cancelled", "wc-refunded"),  # 各平台自己的叫法
    )
    completed_statuses: StatusList = ("completed", "delivered", "交易成功", "已完成")
    cold_after_days: int = Field(default=90, ge=1, le=36500)
    max_delete_share: float = Field(default=0.2, ge=0, le=1)
    unannounced_after_seconds: int = Field(
        default=60, ge=1, le=86_400, description="a completed import that no event announced is taken in after this"
    )
    pool_size: int = Field(default=5, ge=1, le=100)
    connect_timeout_seconds: int = Field(default=5, ge=1, le=300)
    statement_timeout_seconds: int = Field(default=600, ge=1, le=86400)
    lock_timeout_seconds: int = Field(default=60, ge=1, le=3600)
    idle_transaction_timeout_seconds: int = Field(default=60, ge=1, le=3600)

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        if value not in available_timezones():
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
        shown = "***" if "url" in field or "password" in field else repr(problem.get("input"))
        message = problem["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name}={shown} is not usable: {message}; correct it in the environment or in .env") from error


@lru_cache(maxsize=1)
def get_settings() -> EtlSettings:
    """本进程的设置；第一次调用时读取。"""
    return read_settings(EtlSettings)
