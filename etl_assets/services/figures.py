"""客户与商机共用的汇总：按系统订单类型的笔数与金额，取消与完成状态的判断。"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

_KINDS = {"sample": "SAMPLE", "proof": "PROOF", "bulk": "BULK"}
_TOTAL = pl.Decimal(20, 2)

FIGURES = tuple(f"{kind}_{figure}" for figure in ("count", "amount") for kind in _KINDS)


def aggregate_figures() -> list[pl.Expr]:
    """聚合表达式：每种类型的笔数与金额；没有订单时是 0。"""
    counts = [(pl.col("system_order_type") == value).sum().cast(pl.Int32).alias(f"{kind}_count") for kind, value in _KINDS.items()]
    amounts = [
        pl.col("amount").filter(pl.col("system_order_type") == value).sum().cast(_TOTAL).alias(f"{kind}_amount")
        for kind, value in _KINDS.items()
    ]
    return [*counts, *amounts]


def zero_figures() -> list[pl.Expr]:
    """没有订单的行的同样那些列。"""
    counts = [pl.lit(0, pl.Int32).alias(f"{kind}_count") for kind in _KINDS]
    amounts = [pl.lit(0).cast(_TOTAL).alias(f"{kind}_amount") for kind in _KINDS]
    return [*counts, *amounts]


def total_amount() -> pl.Expr:
    """全部金额之和，numeric(20,2)。"""
    return pl.col("amount").sum().cast(_TOTAL)


def has_status(frame: pl.DataFrame, statuses: Iterable[str], column: str = "latest_status") -> pl.Expr:
    """这一列的状态（修剪、casefold 之后）是否在 `statuses`（已 casefold）里。

    状态的不同取值很少：只对取值做 casefold（Polars 只有 to_lowercase），再按原文比较整列。
    """
    distinct = frame[column].drop_nulls().unique()
    wanted = set(statuses)
    matching = [status for status, trimmed in zip(distinct, distinct.str.strip_chars(), strict=True) if trimmed.casefold() in wanted]
    return pl.col(column).is_in(pl.Series(matching, dtype=pl.String).implode()).fill_null(value=False)
