"""比较一张表的查询：一次 FULL JOIN 数出全部差异；再一次取差异的样本。这里只拼查询，不执行。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from etl_assets.comparison.sides import IN_SCOPE

# 键有重复时的第几行，作为键的最后一列
OCCURRENCE = "occurrence"


@dataclass(frozen=True)
class PairedColumn:
    """同一列的两侧；gap 是差的绝对值（时刻以秒计），没有大小可言的列没有。"""

    name: str
    left: sa.ColumnElement[Any]
    right: sa.ColumnElement[Any]
    differs: sa.ColumnElement[bool]
    gap: sa.ColumnElement[Any] | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """一张表的两侧，按键 FULL JOIN；键为 NULL 的行与谁都不配。"""

    left: sa.Subquery
    right: sa.Subquery
    key: Sequence[str]
    compared: Sequence[sa.Column[Any]]
    tolerance: Decimal
    time_tolerance_seconds: Decimal

    @cached_property
    def joined(self) -> sa.Join:
        return sa.join(
            self.left, self.right, sa.and_(*[self.left.c[part] == self.right.c[part] for part in self.key]), full=True
        )

    @cached_property
    def on_left(self) -> sa.ColumnElement[bool]:
        return self.left.c[IN_SCOPE].is_not(None)

    @cached_property
    def on_right(self) -> sa.ColumnElement[bool]:
        return self.right.c[IN_SCOPE].is_not(None)

    @cached_property
    def on_both(self) -> sa.ColumnElement[bool]:
        return sa.and_(self.on_left, self.on_right)

    @cached_property
    def in_scope(self) -> sa.ColumnElement[bool]:
        """一边在范围里，就比这一行。"""
        return sa.or_(self.left.c[IN_SCOPE], self.right.c[IN_SCOPE])

    @cached_property
    def columns(self) -> list[PairedColumn]:
        return [self._paired(column) for column in self.compared]

    def numbered(self) -> Pair:
        """键有重复的两侧：键相同的行按内容编号再配，两份一样的数据不论次序都一一对上，多出来的行就是多出来。"""
        return replace(self, left=self._number(self.left), right=self._number(self.right), key=[*self.key, OCCURRENCE])

    def _number(self, side: sa.Subquery) -> sa.Subquery:
        key = [side.c[part] for part in self.key]
        content = [side.c[column.name] for column in self.compared]
        return sa.select(
            side, sa.func.row_number().over(partition_by=key, order_by=content or key).label(OCCURRENCE)
        ).subquery()

    def _paired(self, column: sa.Column[Any]) -> PairedColumn:
        left, right = self.left.c[column.name], self.right.c[column.name]
        gap, tolerance = None, Decimal(0)
        match column.type:
            case sa.Numeric():
                gap, tolerance = sa.func.abs(left - right), self.tolerance
            case sa.Integer():
                gap = sa.func.abs(sa.cast(left, sa.Numeric) - right)  # int 相减会溢出
            case sa.DateTime():
                # 17 以前的 PostgreSQL 里，无穷大的时刻不能直接相减
                gap, tolerance = (
                    sa.func.abs(sa.extract("epoch", left) - sa.extract("epoch", right)),
                    self.time_tolerance_seconds,
                )
        differs = left.is_distinct_from(right)
        if gap is not None and tolerance:
            differs = sa.and_(differs, sa.func.coalesce(gap > tolerance, sa.true()))  # 只有一边是 NULL，也是不同
        return PairedColumn(column.name, left, right, differs, gap)


def count_rows(pair: Pair) -> sa.Select[Any]:
    """一行：左右各有多少行，不论范围。"""
    return sa.select(
        *[sa.select(sa.func.count()).select_from(side).scalar_subquery() for side in (pair.left, pair.right)]
    )


def count_differences(pair: Pair) -> sa.Select[Any]:
    """一行：配好以后左右各有多少行，不论范围；然后范围里左、右、两边都有、不同的行；然后每列两个：不同的个数、最大的差。"""

    def count(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count().filter(*conditions)

    scoped = sa.and_(pair.in_scope, pair.on_both)
    any_differs = sa.or_(sa.false(), *[column.differs for column in pair.columns])
    per_column: list[sa.ColumnElement[Any]] = []
    for column in pair.columns:
        largest = sa.null() if column.gap is None else sa.func.max(column.gap).filter(scoped, column.differs)
        per_column += [count(scoped, column.differs), largest]
    return sa.select(
        count(pair.on_left),
        count(pair.on_right),
        count(pair.in_scope, pair.on_left),
        count(pair.in_scope, pair.on_right),
        count(scoped),
        count(scoped, any_differs),
        *per_column,
    ).select_from(pair.joined)


def sample_differences(
    pair: Pair, *, missing: bool, extra: bool, columns: Sequence[PairedColumn], limit: int
) -> sa.Select[Any]:
    """每种差异按键的前 limit 个。一行：种类（0 缺，1 多，2 起是 columns 的序号加 2）、键、两边的值的文字。

    一次 JOIN 得到所有不同的行，每种差异各取各的：差异少的列不会被差异多的列挤掉。
    值变成文字：Python 放不下无穷大与公元前的时刻，而人要看的就是文字。
    """
    key = [
        sa.func.coalesce(pair.left.c[part], pair.right.c[part]).label(f"key_{number}")
        for number, part in enumerate(pair.key)
    ]
    nothing = sa.cast(sa.null(), sa.Text)
    kinds = [  # (种类, 条件, 左值, 右值)
        *([(0, ~pair.on_right, nothing, nothing)] if missing else []),
        *([(1, ~pair.on_left, nothing, nothing)] if extra else []),
        *[
            (
                2 + number,
                sa.and_(pair.on_both, column.differs),
                sa.cast(column.left, sa.Text),
                sa.cast(column.right, sa.Text),
            )
            for number, column in enumerate(columns)
        ],
    ]
    labelled = [
        expression.label(f"{name}_{kind}")
        for kind, condition, left, right in kinds
        for name, expression in (("is", condition), ("left", left), ("right", right))
    ]
    different = sa.or_(*[condition for _, condition, _, _ in kinds])
    found = sa.select(*key, *labelled).select_from(pair.joined).where(pair.in_scope, different).cte("found").c
    keys = [found[part.name] for part in key]
    branches = [
        sa.select(
            sa.literal(kind).label("kind"),
            *keys,
            found[f"left_{kind}"].label("left_value"),
            found[f"right_{kind}"].label("right_value"),
        )
        .where(found[f"is_{kind}"])
        .order_by(*keys)
        .limit(limit)
        for kind, *_ in kinds
    ]
    sampled = sa.union_all(*branches).subquery("sampled")
    return sa.select(sampled).order_by(sampled.c.kind, *[sampled.c[part.name] for part in key])
