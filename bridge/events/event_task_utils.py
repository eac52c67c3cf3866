"""事件处理器的声明：@event_task_handler 统一版本检查、字段校验、要敲响哪个任务；处理器只写业务。"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Generic

from pydantic import ValidationError
from pydantic_core import from_json

from bridge.errors import InvalidEventError
from bridge.events.envelope import ENVELOPE_FIELDS
from etl_assets.core.asset_events import EVENT_VERSION, AnyEvent


@dataclass(frozen=True)
class ReceivedEvent(Generic[AnyEvent]):
    """校验过的事件，与流记下的来历。"""

    event: AnyEvent
    subject: str
    sequence: int
    published_at: datetime
    """流存下它的时刻，服务器的时钟。"""
    attempt: int
    """第几次投递，从 1 起；大于 1 时它的效果可能已经在库里。"""


@dataclass(frozen=True)
class Done:
    """效果已经提交；ring 表示有事要做，确认之前先敲门铃。重投的事件若还有到期的日子，仍应为 True。"""

    ring: bool = True


@dataclass(frozen=True)
class Ignored:
    """与我们无关：记一行日志，确认。"""

    reason: str


@dataclass(frozen=True)
class NotYet:
    """前提还没有：限期内再试，到期进死信。它等在流里，太多了会挡住别的事件；自己记得住它的处理器记下来，答 Done。"""

    reason: str


@dataclass(frozen=True)
class Rejected:
    """永远处理不了：进死信。"""

    reason: str


Decision = Done | Ignored | NotYet | Rejected
HandlerFunction = Callable[[Sequence[ReceivedEvent[AnyEvent]]], Awaitable[Sequence[Decision]]]


@dataclass(frozen=True)
class EventTaskHandler(Generic[AnyEvent]):
    """一个处理器和它的声明；没有全局登记，谁要用就交给谁。"""

    function: HandlerFunction[AnyEvent]
    subject: str
    supported_version: str
    required_fields: tuple[str, ...]
    task_name: str
    event_type: type[AnyEvent]

    async def __call__(self, events: Sequence[ReceivedEvent[AnyEvent]]) -> Sequence[Decision]:
        """一批事件，一一对应的决定。"""
        return await self.function(events)

    def parse(self, data: bytes) -> AnyEvent:
        """原始字节到事件；不合约定抛 InvalidEventError，理由只有一句。"""
        content = _json_object(data)
        version = content.get("event_version")
        if version != self.supported_version:
            raise InvalidEventError(f"event_version is {version!r}, supported is {self.supported_version!r}")
        for field in (*ENVELOPE_FIELDS, *self.required_fields):
            if content.get(field) is None:
                raise InvalidEventError(f"field {field} is missing")
        try:
            # strict：JSON 里的数字不会被当成时间、字符串不会被当成数字
            return self.event_type.model_validate_json(data, strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, problem["loc"]))
            raise InvalidEventError(f"field {field}: {problem['msg']}" if field else problem["msg"]) from error


def event_task_handler(
    *,
    subject: str,
    event_type: type[AnyEvent],
    task_name: str,
    supported_version: str = EVENT_VERSION,
    required_fields: tuple[str, ...] = (),
) -> Callable[[HandlerFunction[AnyEvent]], EventTaskHandler[AnyEvent]]:
    """声明一个处理器：收 subject 上的 event_type，效果提交后敲响 TaskIQ 任务 task_name。"""

    return partial(
        EventTaskHandler,
        subject=subject,
        supported_version=supported_version,
        required_fields=required_fields,
        task_name=task_name,
        event_type=event_type,
    )


def _json_object(data: bytes) -> dict[str, Any]:
    """pydantic_core 的解析器对嵌套过深、编码错误都只抛 ValueError；标准库的会栈溢出。"""
    try:
        content = from_json(data)
    except ValueError as error:
        raise InvalidEventError(f"not JSON ({error})", is_garbage=True) from error
    if not isinstance(content, dict):
        raise InvalidEventError(f"a JSON {type(content).__name__} instead of an object", is_garbage=True)
    return content
