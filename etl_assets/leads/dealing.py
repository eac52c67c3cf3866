"""把客户的订单依次分到商机编号：窗口函数，人关闭过的商机按关闭的次序逐轮处理。"""

from __future__ import annotations

import polars as pl


def deal_orders(orders: pl.DataFrame, closings: pl.DataFrame) -> pl.DataFrame:
    """给每个订单一个 lead_no。规则见 DOMAIN 第 5 节。

    :param orders: 一行一个计数的订单，按 (customer_key, ordered_at, order_id) 排好；wins 表示大货完成。
    :param closings: 一行一个人的关闭：customer_key、lead_no、closed_at。
    :return: 同样的行加 lead_no（Int32），次序不保证。

    没有关闭时 lead_no 是 1 加之前的 wins 数。有关闭时，每个客户的第 r 个关闭在第 r 轮处理：
    编号在它之前的订单就此定下，到了它的订单按 closed_at 分成属于它的与往后的。循环的次数是关闭数，不是行数。
    """
    remaining = orders.with_columns(base=pl.lit(1, pl.Int32))
    ranked = closings.sort("customer_key", "lead_no").with_columns(round=pl.int_range(pl.len()).over("customer_key"))
    rounds = ranked.partition_by("round", maintain_order=True, include_key=False)
    settled = []
    for closing in rounds:
        numbered = _number(remaining).join(closing.rename({"lead_no": "closed_no"}), on="customer_key", how="left", maintain_order="left")
        reached = pl.col("lead_no") >= pl.col("closed_no")
        belongs = reached & (pl.col("ordered_at") <= pl.col("closed_at"))
        settled.append(numbered.filter(~reached))
        settled.append(numbered.filter(belongs).with_columns(lead_no=pl.col("closed_no")))
        later = numbered.filter(pl.col("closed_no").is_null() | (reached & ~belongs))
        remaining = later.with_columns(base=pl.coalesce(pl.col("closed_no") + 1, "base"))
        remaining = remaining.select(*orders.columns, "base")
    settled.append(_number(remaining))
    return pl.concat([part.select(*orders.columns, "lead_no") for part in settled])


def _number(orders: pl.DataFrame) -> pl.DataFrame:
    wins = pl.col("wins").cast(pl.Int32)
    return orders.with_columns(lead_no=pl.col("base") + (wins.cum_sum() - wins).over("customer_key"))
