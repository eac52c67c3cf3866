"""批处理：数据再多也分批走完，内存有界；每批做什么由调用者给。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import polars as pl

from etl_assets.services.vectorized_queries import WriteCounts

CUSTOMERS_PER_BATCH = 500_000
"""一批客户的结果要装得进内存；他们的订单一段一段流过。"""


def transform_batches(batches: Iterable[pl.DataFrame], transform: Callable[[pl.DataFrame], pl.DataFrame]) -> pl.DataFrame:
    """一边读一边逐批变换，再拼成一帧；变换应当缩小数据，原始的那批随即释放。"""
    return pl.concat([transform(batch) for batch in batches])


def whole_groups(frames: Iterable[pl.DataFrame], key: str) -> Iterator[pl.DataFrame]:
    """按 `key` 分组依次到来的帧，重新切过：没有一组跨两帧。"""
    arriving = iter(frames)
    pending = next(arriving)
    for frame in arriving:
        is_begun = pl.col(key) == pending.item(-1, key)
        whole = pending.filter(~is_begun)
        if not whole.is_empty():
            yield whole
        pending = pl.concat([pending.filter(is_begun), frame])
    yield pending


def write_batches(count: int, write: Callable[[int], WriteCounts]) -> WriteCounts:
    """依次做第 0 … count-1 批，返回写下行数之和；都在调用者的事务里。"""
    return sum((write(number) for number in range(count)), WriteCounts())
