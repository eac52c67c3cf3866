"""失败之后隔多久再试：只有这一个公式。各处的首次与最长写在用它的地方，一处一行；数据库里的照 steps 取。"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import sqlalchemy as sa

_STABLE_SECONDS = 60.0


@dataclass(frozen=True)
class Backoff:
    """第一次失败之后等 first_seconds，以后每次 factor 倍，至多 longest_seconds；spread 是上下错开几成。"""

    first_seconds: float
    longest_seconds: float
    factor: float = 2.0
    spread: float = 0.0

    def seconds(self, failures: int) -> float:
        """第几次失败（从 1 起）之后等多久。"""
        delay = self.steps[min(failures, len(self.steps)) - 1]
        return delay * random.uniform(1 - self.spread, 1 + self.spread)  # noqa: S311  # 只为错开时间

    @cached_property
    def steps(self) -> list[float]:
        """每次失败之后等多久；最后一个是最长的，再往后都等它。"""
        steps = [float(min(self.first_seconds, self.longest_seconds))]  # 驱动不收整数与小数混着的数组
        while steps[-1] < self.longest_seconds:
            steps.append(float(min(steps[-1] * self.factor, self.longest_seconds)))
        return steps

    def seconds_in_sql(self, failures: sa.ColumnElement[int]) -> sa.ColumnElement[float]:
        """失败了几次在数据库里的：不错开。"""
        within = [(failures <= number, seconds) for number, seconds in enumerate(self.steps, start=1)]
        return sa.case(*within, else_=self.longest_seconds)


def failures_in_a_row(before: int, *, lived_seconds: float) -> int:
    """又失败了一次，是连着的第几次：活过一阵再失败的算第一次。"""
    return 1 if lived_seconds > _STABLE_SECONDS else before + 1
