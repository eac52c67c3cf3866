"""客户与商机共用的汇总：按系统订单类型的笔数与金额，取消与完成状态的判断。"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache

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

    状态的不同取值很少，先在取值上做一次 casefold，再按原文比较。Polars 只有 to_lowercase；
    与 casefold 有出入的那些字（ß、词尾的 σ）罕见，有才逐字替换：那张表有一千多项。
    """
    distinct = frame.select(pl.col(column).unique())
    stripped = pl.col(column).str.strip_chars()
    is_unusual = distinct.select(pl.col(column).str.contains(_unusual_letters()).any()).item()
    folded = stripped.str.replace_many(_casefold_table()) if is_unusual else stripped.str.to_lowercase()
    matching = distinct.filter(folded.is_in(list(statuses)))[column]
    return pl.col(column).is_in(matching.implode()).fill_null(value=False)


@lru_cache(maxsize=1)
def _unusual_letters() -> str:
    """正则：Polars 的小写与 Python 的 casefold 不同的字（两边的 Unicode 版本也不同）；大写的 Σ 小写成什么要看它在不在词尾。"""
    letters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    lowered = pl.Series(letters).str.to_lowercase()
    unusual = [letter for letter, lower in zip(letters, lowered, strict=True) if letter.casefold() != lower]
    return "[Σ" + "".join(f"\\x{{{ord(letter):X}}}" for letter in unusual) + "]"


@lru_cache(maxsize=1)
def _casefold_table() -> dict[str, str]:
    """Unicode 的完全大小写折叠。"""
    return {character: folded for code in range(sys.maxunicode + 1) if (folded := (character := chr(code)).casefold()) != character}
