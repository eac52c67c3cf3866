"""全项目唯一的日志格式：structlog，一行一个事件；标准库 logging 的日志也走同一格式。"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

from etl_assets.core.text import escape_in_json, escape_invisible

_URL_PASSWORD = re.compile(r"(?P<head>\w+://[^\s:/@]*):[^\s@/]*@")
_NATS_TOKEN = re.compile(r"\b(?P<head>(?:nats|tls|wss?)://)[^\s:/@]+@")
_LIBPQ_PASSWORD = re.compile(r"\b(?P<head>(?:ssl)?password=)(?:'(?:[^'\\]|\\.)*'|[^\s&'\"]+)")
_NKEY = re.compile(r"\bS[UAON][A-Z2-7]{56}\b")


def redact(text: str) -> str:
    """URL 与 libpq 写法里的口令、NATS 的令牌、nkey 的种子，都换成 ***。"""
    for pattern, shown in (
        (_URL_PASSWORD, r"\g<head>:***@"),
        (_NATS_TOKEN, r"\g<head>***@"),
        (_LIBPQ_PASSWORD, r"\g<head>***"),
        (_NKEY, "***"),
    ):
        text = pattern.sub(shown, text)
    return text


def _redact_values(_logger: Any, _method: str, event: EventDict) -> EventDict:
    return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}


def _escape_values(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """日志里有别人的文字（事件、死信、子进程的最后一句）：终端上不能起作用。"""
    return {
        key: escape_invisible(value, keep="\n\t") if isinstance(value, str) else value for key, value in event.items()
    }


def _dump_json(event: EventDict, **options: Any) -> str:
    return escape_in_json(json.dumps(event, ensure_ascii=False, **options))


def process_name() -> str:
    """哪台主机的哪个进程：租约、物化、日志里的工人都叫这个名字。"""
    return f"{socket.gethostname()}:{os.getpid()}"


def configure_logging(component: str, *, level: str = "INFO", console: bool | None = None) -> None:
    """设置本进程的日志：终端上给人看，否则每行一个 JSON 对象，写到 stderr。

    同一件事的键到处一样，见 docs/logs.md。

    :param component: 进程的角色（listener、worker、stack …），写进每一行。
    :param console: None 表示看 stderr 是不是终端。
    """
    human = sys.stderr.isatty() if console is None else console
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    # 缺省的样式会印出局部变量，里面有口令；structlog 只在没有配置时才看 NO_COLOR
    for_people = structlog.dev.ConsoleRenderer(
        colors=not os.environ.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
    )
    for_programs = structlog.processors.JSONRenderer(_dump_json)
    rendering: list[Processor] = [_escape_values, for_people] if human else [_redact_values, for_programs]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message") if not human else _redact_values,
                structlog.processors.format_exc_info,
                *rendering,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # 迁移成功不必每次说三行
    structlog.contextvars.bind_contextvars(component=component)


class RepeatedWarning:
    """故障期间一再重复的一句话：头一回立刻说，以后一分钟一回，附上期间没说的几回。"""

    SECONDS = 60.0

    def __init__(
        self, logger: structlog.stdlib.BoundLogger, message: str, *, level: Literal["warning", "error"] = "warning"
    ) -> None:
        self._logger = logger
        self._message = message
        self._level = level
        self._said: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()
        self._lock = threading.Lock()

    def say(self, kind: str, **fields: Any) -> None:
        """:param kind: 哪一种故障（错误的类名）；另一种不必等这一种。"""
        with self._lock:
            now = time.monotonic()
            if now - self._said.get(kind, -self.SECONDS) < self.SECONDS:
                self._unsaid[kind] += 1
                return
            self._said[kind] = now
            unsaid = self._unsaid.pop(kind, 0)
        getattr(self._logger, self._level)(self._message, **fields, **({"repeated": unsaid} if unsaid else {}))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """按模块名取一个结构化日志器。"""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
