"""就绪检查：一个刚启动的子进程能用了没有。都不阻塞太久，由监督者反复问。"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etl_assets.embedded.child_process import ChildProcess
from etl_assets.embedded.loopback_port import accepts_connections

_READY_MESSAGE = "ready"


@dataclass(frozen=True)
class Attempt:
    """一次启动：进程，以及它在日志里从哪个字节开始写。"""

    process: ChildProcess
    log: Path
    log_start: int


ReadinessCheck = Callable[[Attempt], bool]


def started(_attempt: Attempt) -> bool:
    """活着就算就绪。"""
    return True


def listens_on(port: int) -> ReadinessCheck:
    return lambda _attempt: accepts_connections(port)


def logged_ready(attempt: Attempt) -> bool:
    """这一次启动以来，日志里有一行 JSON 的 message 是 ready。"""
    try:
        with attempt.log.open("rb") as file:
            file.seek(attempt.log_start)
            return any(_is_ready_line(line) for line in file)
    except FileNotFoundError:  # 有人清掉了日志
        return False


def _is_ready_line(line: bytes) -> bool:
    if _READY_MESSAGE.encode() not in line:
        return False
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return isinstance(event, dict) and event.get("message") == _READY_MESSAGE
