"""别的进程里的工人：同一个数据库，各有自己的引擎。"""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from random import Random
from time import monotonic

from structlog.testing import capture_logs

from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from tests.integration.engine.chain import ASSETS, Chain


@dataclass(frozen=True)
class Labour:
    """做了几个运行；与别的运行冲突、重来了几次。"""

    runs: int = 0
    conflicts: int = 0

    def __add__(self, other: Labour) -> Labour:
        return Labour(self.runs + other.runs, self.conflicts + other.conflicts)


def start_workers(count: int) -> ProcessPoolExecutor:
    """spawn 出来的进程：像真的工人那样，什么也不从父进程继承；有活才起。"""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


@lru_cache(maxsize=1)
def open_chain(settings: EtlSettings) -> Chain:
    """这个进程的资产链；头一次用到时才连接。"""
    return Chain(build_engine(settings), settings, allow_deletes=True)


def materialize(settings: EtlSettings, first: date, last: date, assets: Collection[str]) -> None:
    open_chain(settings).run(first, last, assets=assets)


def work(settings: EtlSettings) -> None:
    open_chain(settings).run_due()


def labour(settings: EtlSettings, days: tuple[date, date], *, seed: int, seconds: float) -> Labour:
    """一刻不停地物化随机的区间、随机的资产；有运行失败就抛出。"""
    randomness = Random(seed)  # noqa: S311  # 只为每次都一样
    chain = open_chain(settings)
    length = (days[1] - days[0]).days + 1
    runs = 0
    deadline = monotonic() + seconds
    with capture_logs() as logs:
        while monotonic() < deadline:
            first = days[0] + timedelta(days=randomness.randrange(length))
            last = min(first + timedelta(days=randomness.randrange(length)), days[1])
            chain.run(first, last, assets=randomness.choice([ASSETS, *[[asset] for asset in ASSETS]]))
            runs += 1
    return Labour(runs, sum("conflict" in entry["event"] for entry in logs))
