"""`etl doctor` 的一项发现。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """一项检查的结果；不是 ok 的，says 也说怎么办。fix 是 `etl doctor --fix` 修得了它的那一种（operations/mending.py）。"""

    check: str
    state: State
    says: str
    fix: str | None = None
