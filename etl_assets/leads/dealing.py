"""把客户的订单依次分到商机编号：窗口函数；人关闭过的商机逐轮找出它们在订单里的分界。"""

from __future__ import annotations

import polars as pl


def deal_orders(orders: pl.DataFrame, closings: pl.DataFrame) -> pl.DataFrame:
    """给每个订单一个 lead_no。规则见 DOMAIN 第 5 节。

    :param orders: 一行一个计数的订单，按 (customer_key, ordered_at, order_id) 排好；wins 表示大货完成。
    :param closings: 一行一个人的关闭：customer_key、lead_no（从 1 起）、closed_at。
    :return: 同样的行加 lead_no（Int32），次序不保证。

    没有关闭时 lead_no 是 1 加之前的 wins 数。
    """
    wins_before = pl.col("wins").cum_sum().cast(pl.Int32) - pl.col("wins").cast(pl.Int32)
    without = orders.join(closings, on="customer_key", how="anti", maintain_order="left")
    numbered = without.with_columns(lead_no=1 + wins_before.over("customer_key"))
    cut = orders.join(closings, on="customer_key", how="semi", maintain_order="left")
    if cut.is_empty():
        return numbered
    positioned = cut.with_columns(wins_before=wins_before).with_row_index("position")
    stretches = _find_stretches(positioned, closings)
    lead_no = pl.col("first_no") + pl.when("is_open").then(
        pl.col("wins_before") - pl.col("wins_before_stretch")
    ).otherwise(0)
    dealt = positioned.join_asof(stretches, on="position").with_columns(lead_no=lead_no.cast(pl.Int32))
    return pl.concat([numbered, dealt.select(numbered.columns)])


def _find_stretches(orders: pl.DataFrame, closings: pl.DataFrame) -> pl.DataFrame:
    """订单按关闭切成的段，一行一段，按开头的 position 排好：is_open 的从 first_no 起随 wins 往后数，别的都属于 first_no。

    第 r 轮处理每个客户的第 r 个关闭。wins_before 与 position 都只增不减，所以每轮只是在订单里二分查找：
    订单再多、关闭再多，订单也只在开头与结尾各走一遍。

    :param orders: 有关闭的客户的订单，加上 position 与 wins_before（从头数起，不分客户）。
    """
    wins_before = orders["wins_before"]
    first = orders.group_by("customer_key").agg(pl.col("position").min(), end=pl.col("position").max() + 1)
    present = first.select("customer_key", "position", "end", first_no=pl.lit(1, pl.Int32))
    stretches = [_open(present)]
    for closing in _rounds(orders, closings):
        present = present.join(closing, on="customer_key").filter(pl.col("position") < pl.col("end"))
        # 编号数到被关闭的那一个的第一单；没有就轮不到这个关闭，客户也就分完了
        reached = wins_before.gather(present["position"]) + present["closed_no"] - present["first_no"]
        present = present.with_columns(
            reached=pl.max_horizontal("position", wins_before.search_sorted(reached, side="left"))
        )
        present = present.filter(pl.col("reached") < pl.col("end"))
        stretches.append(present.select(position="reached", first_no="closed_no", is_open=False))
        present = present.select(
            "customer_key",
            pl.max_horizontal("reached", "later").alias("position"),
            "end",
            (pl.col("closed_no") + 1).alias("first_no"),
        )
        stretches.append(_open(present.filter(pl.col("position") < pl.col("end"))))
    ordered = (
        pl.concat(stretches).unique("position", keep="last", maintain_order=True).sort("position")
    )  # 空的段让位给后来的
    return ordered.with_columns(wins_before_stretch=wins_before.gather(ordered["position"]))


def _open(present: pl.DataFrame) -> pl.DataFrame:
    return present.select("position", "first_no", is_open=True)


def _rounds(orders: pl.DataFrame, closings: pl.DataFrame) -> list[pl.DataFrame]:
    """每轮一帧，每个客户至多一行：closed_no，与 closed_at 之后那一单的 position（later；没有更早的订单就空着）。"""
    last = orders.select("customer_key", "ordered_at", later=pl.col("position") + 1)
    # 不查次序：分了组（by）Polars 就查不了，只会告警；关闭在这里排过，订单在各个客户里本来就排好
    placed = closings.sort("closed_at").join_asof(
        last, left_on="closed_at", right_on="ordered_at", by="customer_key", check_sortedness=False
    )
    ranked = placed.sort("customer_key", "lead_no").with_columns(round=pl.int_range(pl.len()).over("customer_key"))
    rounds = ranked.select("customer_key", "round", "later", closed_no="lead_no")
    return rounds.partition_by("round", maintain_order=True, include_key=False)
