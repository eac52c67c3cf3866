"""订单状态算作什么：名单是设置里的，比较的办法是 ETL 的。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import polars as pl

from etl_assets.services.figures import matching_statuses, status_spellings

CountsAs = Literal["cancelled", "completed", "order"]


@dataclass(frozen=True)
class Statuses:
    """两份名单，已修剪、casefold；两份都有的算取消。"""

    cancelled: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()

    def count_as(self, statuses: Iterable[str]) -> dict[str, CountsAs]:
        """每个原文算作什么。"""
        spellings = status_spellings(pl.Series(list(statuses), dtype=pl.String))
        found: dict[str, CountsAs] = dict.fromkeys(spellings, "order")
        found.update(dict.fromkeys(matching_statuses(spellings, self.completed), "completed"))
        found.update(dict.fromkeys(matching_statuses(spellings, self.cancelled), "cancelled"))
        return found
