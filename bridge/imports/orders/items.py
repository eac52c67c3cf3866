"""商品行合成订单：一列是订单的还是商品的，由整个文件的值来看；看出了什么都要说，看不出的不合。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from bridge.imports.orders.conventions import is_number
from bridge.imports.orders.mapping import ColumnMapping
from bridge.imports.orders.statuses import Statuses
from bridge.imports.rules.errors import ImportFileError, shorten
from bridge.imports.rules.profile import ROW_NUMBER, Aggregate

_LEFT_OUT = "left out "
_RANK = "rank "
# 状态不同的几行合成一单：有一行还没完就没完，取消了的最后才算
_RANKS = {"order": 0, "completed": 1, "cancelled": 2}
_FEW_ORDERS = 3


@dataclass(frozen=True)
class MergedColumn:
    """一列的几行怎样成了一个值，为什么；aggregate 是配置里的写法，没有这样的写法时是 None。"""

    column: str
    aggregate: Aggregate | None
    taken: str


@dataclass(frozen=True)
class Merging:
    """lines 是要合的行；expressions 每个 target 一个，放进 group_by(keys).agg()；problem：为什么不能这样合。"""

    lines: pl.DataFrame
    expressions: dict[str, pl.Expr]
    columns: list[MergedColumn] = field(default_factory=list)
    problem: ImportFileError | None = None


def aggregate(name: str, how: Aggregate) -> pl.Expr:
    """空值不参与；全空还是空。"""
    values = pl.col(name)
    match how:
        case "first":
            return values.first(ignore_nulls=True)
        case "last":
            return values.last(ignore_nulls=True)
        case "sum":
            return pl.when(values.count() > 0).then(values.sum())
        case "min":
            return values.min()
        case "max":
            return values.max()


class ItemLines:
    """一行是一件商品、又没有说怎样合时，各列怎样合。

    :param lines: 换过类型的行；keys 相同的是一单。
    :param evidence: 其中可以当证据的（坏行所在的订单不能）。
    """

    def __init__(
        self,
        path: Path,
        mapping: ColumnMapping,
        statuses: Statuses,
        *,
        lines: pl.DataFrame,
        evidence: pl.DataFrame,
        keys: Sequence[str],
    ) -> None:
        self._path = path
        self._mapping = mapping
        self._statuses = statuses
        self._keys = list(keys)
        self._lines = lines
        self._several = evidence.filter(pl.len().over(self._keys) > 1)
        self._columns: dict[str, MergedColumn] = {}
        self._problem: ImportFileError | None = None

    def plan(self) -> Merging:
        """一单的几行说的是不同的客户或类型时，有 problem。"""
        expressions: dict[str, pl.Expr] = {}
        # 状态先看：取消了的行不算进金额与数量
        targets = {
            name: target for name, target in self._mapping.targets.items() if target.aggregate_expression is None
        }
        for name in sorted(targets, key=lambda name: name != "order_status"):
            expressions[name] = self._merge(name)
        columns = [self._columns[name] for name in targets if name in self._columns]
        return Merging(self._lines, {name: expressions[name] for name in targets}, columns, self._problem)

    def _merge(self, name: str) -> pl.Expr:
        target = self._mapping.targets[name]
        if "aggregate" in target.model_fields_set:
            return self._take(
                name, target.aggregate, f"{target.aggregate} of the lines of an order, as the profile says"
            )
        if name in ("order_id", "shop") or target.constant is not None or not self._several.height:
            return aggregate(name, "first")
        if is_number(name, target):
            return self._merge_numbers(name)
        if name == "ordered_at":
            return self._merge_times(name)
        return self._merge_status(name) if name == "order_status" else self._merge_text(name)

    def _merge_numbers(self, name: str) -> pl.Expr:
        """每行都有而且相同：是订单的，取一次；只有一行有：也是。不同：是商品的，相加。"""
        filled, lines, kinds = pl.col("filled"), pl.col("lines"), pl.col("kinds")
        found = self._look(name).filter((kinds > 1) | (pl.col("first") != 0))
        if found.height and found.select((filled == 1).all()).item():
            return self._take(name, "first", "on one line of an order only, taken once")
        if not found.height or not found.select(((kinds == 1) & (filled == lines)).all()).item():
            return self._sum(name, "summed over the lines of an order")
        if name == "quantity" and found.select((pl.col("first").is_between(0, lines, closed="none")).any()).item():
            # 一行至少一件：两行的订单不会总共只有一件
            return self._sum(name, "summed over the lines of an order (there are fewer than lines on each)")
        hint = (
            '; if they are items of one price, say aggregate = "sum" in a profile' if found.height < _FEW_ORDERS else ""
        )
        orders = f"{found.height:,} order{'s' if found.height > 1 else ''}"
        return self._take(name, "first", f"the same on all lines of an order ({orders}), taken once{hint}")

    def _sum(self, name: str, taken: str) -> pl.Expr:
        summed = self._take(name, "sum", taken)
        if _LEFT_OUT not in self._lines.columns:
            return summed
        values = pl.col(name).filter(~pl.col(_LEFT_OUT))
        return pl.when(values.count() > 0).then(values.sum())

    def _merge_times(self, name: str) -> pl.Expr:
        if self._differs(name).height:
            return self._take(name, "min", "differs between the lines of an order, the earliest taken")
        return self._take_once(name)

    def _merge_status(self, name: str) -> pl.Expr:
        """有一行还没完，订单就没完；全都取消了，订单才取消。取消了的行不在其余各行的合计里。"""
        several = self._differs(name)
        if not several.height:
            return self._take_once(name)
        ranks = {
            text: _RANKS[counts]
            for text, counts in self._statuses.count_as(self._lines[name].drop_nulls()).items()
            if text.strip()
        }
        rank = pl.col(name).replace_strict(ranks, default=None, return_dtype=pl.Int8)
        lines = self._lines.with_columns(rank.alias(_RANK))
        is_left_out = (pl.col(_RANK) == _RANKS["cancelled"]) & (
            pl.col(_RANK).min().over(self._keys) < _RANKS["cancelled"]
        )
        self._lines = lines.with_columns(is_left_out.fill_null(value=False).alias(_LEFT_OUT))
        left_out = int(self._lines[_LEFT_OUT].sum())
        taken = "cancelled where all lines are, else completed where the others are, else the first that is neither"
        sums = f"; cancelled lines of orders that go on ({left_out:,}) are in no sum" if left_out else ""
        orders = f"{several.height:,} order{'s' if several.height > 1 else ''}"
        self._take(name, None, f"differs between the lines of {orders}: {taken}{sums}")
        return pl.col(name).filter(pl.col(_RANK) == pl.col(_RANK).min()).first()

    def _merge_text(self, name: str) -> pl.Expr:
        different = self._differs(name)
        if not different.height:
            return self._take_once(name)
        order = self._several.join(different.head(1), on=self._keys, how="semi", nulls_equal=True)
        kept = order.select(ROW_NUMBER, _text(name)).drop_nulls().unique(name, keep="first", maintain_order=True)
        (row, value), (other_row, other) = kept.head(2).rows()
        self._problem = self._problem or ImportFileError(
            self._path,
            f"is the {name} in one line of order {shorten(order['order_id'][0].strip())}, and {shorten(other)} in row {other_row}: "
            "an order has one",
            row=row,
            column=self._mapping.shown_column(name),
            value=value,
            advice=f'say which in a profile with lines = "items" under [file], for example {name} = {{ …, aggregate = "first" }}',
        )
        return self._take(name, "first", "differs between the lines of an order, the first taken")

    def _take_once(self, name: str) -> pl.Expr:
        """文字与时刻：各行相同，或只有一行有。"""
        filled = self._look(name)["filled"]
        if filled.is_empty():
            return aggregate(name, "first")
        where = "the same on all lines of an order" if (filled > 1).any() else "on one line of an order only"
        return self._take(name, "first", f"{where}, taken once")

    def _look(self, name: str) -> pl.DataFrame:
        """每个有几行、又不全空的订单：几行有值，几种值，第一个值。"""
        value = _text(name) if self._several[name].dtype == pl.String else pl.col(name)
        values = value.drop_nulls()
        found = self._several.group_by(self._keys, maintain_order=True).agg(
            pl.len().alias("lines"),
            values.len().alias("filled"),
            values.n_unique().alias("kinds"),
            values.first().alias("first"),
        )
        return found.filter(pl.col("filled") > 0)

    def _differs(self, name: str) -> pl.DataFrame:
        return self._look(name).filter(pl.col("kinds") > 1).select(self._keys)

    def _take(self, name: str, how: Aggregate | None, taken: str) -> pl.Expr:
        if self._several.height:
            self._columns[name] = MergedColumn(self._mapping.shown_column(name), how, taken)
        return aggregate(name, how or "first")


def _text(name: str) -> pl.Expr:
    stripped = pl.col(name).str.strip_chars()
    return pl.when(stripped != "").then(stripped)
