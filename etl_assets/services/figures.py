"""客户与商机共用的汇总：按系统订单类型的笔数与金额，取消与完成状态的判断。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl

_KINDS = {"sample": "SAMPLE", "proof": "PROOF", "bulk": "BULK"}
_TOTAL = pl.Decimal(20, 2)

FIGURES = tuple(f"{kind}_{figure}" for figure in ("count", "amount") for kind in _KINDS)
COUNTS = tuple(f"{kind}_count" for kind in _KINDS)


def aggregate_figures() -> list[pl.Expr]:
    """聚合表达式：每种类型的笔数与金额；没有订单时是 0。"""
    counts = [
        (pl.col("system_order_type") == value).sum().cast(pl.Int32).alias(f"{kind}_count")
        for kind, value in _KINDS.items()
    ]
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


def status_spellings(statuses: pl.Series) -> Mapping[str, str]:
    """这一列的每个不同取值 → 它修剪、casefold 之后的样子。

    不同的取值很少：只对取值做 casefold（Polars 只有 to_lowercase），`has_status` 再按原文比较整列。
    """
    distinct = statuses.drop_nulls().unique()
    return {status: trimmed.casefold() for status, trimmed in zip(distinct, distinct.str.strip_chars(), strict=True)}


def has_status(spellings: Mapping[str, str], wanted: Iterable[str]) -> pl.Expr:
    """latest_status 是否在 `wanted`（已 casefold）里；没有状态的不在。"""
    matching = pl.Series(matching_statuses(spellings, wanted), dtype=pl.String)
    return pl.col("latest_status").is_in(pl.lit(matching).implode()).fill_null(value=False)


def matching_statuses(spellings: Mapping[str, str], wanted: Iterable[str]) -> list[str]:
    """这些原文里，哪些在 `wanted`（已 casefold）里；SQL 也按原文比较，它没有 casefold。"""
    folded = set(wanted)
    return [status for status, spelling in spellings.items() if spelling in folded]
