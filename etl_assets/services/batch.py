"""批处理：数据再多也分批走完，内存有界；每批做什么由调用者给。"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import polars as pl

from etl_assets.services.vectorized_queries import WriteCounts

CUSTOMERS_PER_BATCH = 50_000
"""一批客户连同他们的全部订单要装得进内存。"""


def transform_batches(batches: Iterable[pl.DataFrame], transform: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    """一边读一边逐批变换，再拼成一帧；变换应当缩小数据，原始的那批随即释放。"""
    return pl.concat([transform(batch) for batch in batches])


def write_batches(count: int, write: Callable[[int], WriteCounts]) -> WriteCounts:
    """依次做第 0 … count-1 批，返回写下行数之和；都在调用者的事务里。"""
    return sum((write(number) for number in range(count)), WriteCounts())
