"""批处理：数据再多也分批走完，内存有界；每批做什么由调用者给。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import polars as pl

CUSTOMERS_PER_BITE = 2_000
"""一口客户一个事务，这么多以下不再分：他们的锁不到一秒就放开。"""
_LARGEST_BITE = 20_000
"""这么多客户的结果装得进内存。"""


def bite_of(customers: int) -> int:
    """这么多客户，一口几个：十口以上，一口只占一成的锁行，不相干的客户难得要等；口越大，给每口一份的语句越不显多。"""
    return max(CUSTOMERS_PER_BITE, min(customers // 10, _LARGEST_BITE))


def transform_batches(
    batches: Iterable[pl.DataFrame], transform: Callable[[pl.DataFrame], pl.DataFrame]
) -> pl.DataFrame:
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
