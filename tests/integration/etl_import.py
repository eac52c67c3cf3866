"""`etl import` 在本进程里跑：退出码与说了什么；不宣布。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    exit_code: int
    out: str
    err: str


Import = Callable[..., Said]
