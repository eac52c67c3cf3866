"""订单号相同的几行：是一单的几个版本，还是一单的几件商品？看不出就停下来问，不悄悄只留一行。

通读时每行只记 8 个字节的散列；有重复的，才把文件再读一遍看那些行，散列碰巧相同的在那时认出来。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from bridge.imports.files.cells import CellBlock
from bridge.imports.orders.builder import ORDER_KEY, OrderBlock, OrderBuilder, trim, trim_key
from bridge.imports.orders.items import MergedColumn
from bridge.imports.rules.errors import ImportFileError, shorten
from bridge.imports.rules.problems import merge_problems
from bridge.imports.rules.profile import ROW_NUMBER
from bridge.imports.rules.toml import to_toml

# 说明用的样本：这么多订单，它们的行至多这么多
_SAMPLE_ORDERS = 5_000
_SAMPLE_ROWS = 100_000
_SHOWN = 6
# 来源的列可以叫任何名字，这几列让开
_ID, _SHOP, _HASH = "key order_id", "key shop", "key hash"
_KEYS = pl.Schema({ROW_NUMBER: pl.Int64(), _ID: pl.String(), _SHOP: pl.String(), _HASH: pl.UInt64()})


class OrderNumbers:
    """一个文件的订单号（连同店）。

    :ivar distinct: 有几个；通读完了才有。
    :ivar repeated: 其中几个不止一行。
    """

    def __init__(self, builder: OrderBuilder) -> None:
        self._builder = builder
        self._hashes: list[pl.Series] = []
        self._suspects = pl.Series(dtype=pl.UInt64)
        self._compared = _find_compared(builder)
        self.distinct = 0
        self.repeated = 0

    @property
    def conflict(self) -> bool:
        """已经知道要拒绝：后面的块只数订单号，不必再写。"""
        return not self._suspects.is_empty()

    def observe(self, built: OrderBlock, block: CellBlock, texts: pl.DataFrame) -> None:
        """看一块订单；同一块里有的，当场就比。texts 是修剪过的文字。"""
        keys = _hash_keys(built.orders[ROW_NUMBER], texts)
        self._hashes.append(keys[_HASH])
        if self._builder.lines or keys[_HASH].n_unique() == keys.height:
            return
        repeated = keys.filter(pl.col(_HASH).is_duplicated())
        rows = built.orders if self._builder.merges else block.cells
        different = _find_different(
            repeated.join(rows.select(ROW_NUMBER, *self._compared), on=ROW_NUMBER, how="left"), self._compared
        )
        if different.height and self._builder.merges:
            raise self._ungrouped(different)
        self._suspects = different[_HASH].unique().head(_SAMPLE_ORDERS)

    def count(self, block: CellBlock) -> None:
        """只数一块里的订单号。"""
        self._hashes.append(_trim_and_hash(self._builder.read_numbers(block))[_HASH])

    def finish(self) -> None:
        """
        :raises ImportFileError: 一个订单号有几行，除了状态还有不同，又没有说那是什么。
        """
        hashes = pl.concat(self._hashes).sort() if self._hashes else pl.Series(dtype=pl.UInt64)
        self._hashes = []
        again = hashes.filter(hashes == hashes.shift(1))
        repeated = again.unique(maintain_order=True)
        self.distinct, self.repeated = hashes.len() - again.len(), repeated.len()
        del hashes, again
        if self._builder.lines or self._builder.merges or not self.repeated:
            return
        suspects = self._suspects if self.conflict else self._find_suspects(repeated)
        if suspects.is_empty():
            return
        error = self._explain(suspects.head(_SAMPLE_ORDERS).sort())
        if error is not None:
            raise error

    def _find_suspects(self, repeated: pl.Series) -> pl.Series:
        """重复的订单号里，各行内容的散列不同的那些；每个订单号只记它第一行的。"""
        first = pl.Series([None], dtype=pl.UInt64).new_from_index(0, repeated.len())
        suspects = pl.Series(dtype=pl.UInt32)
        least, most = pl.col("content").min().alias("least"), pl.col("content").max().alias("most")
        for block in self._reread(repeated):
            built = self._builder.build(block)
            contents = block.cells.select(ROW_NUMBER, content=block.cells.select(self._compared).hash_rows())
            keys = _trim_and_hash(built.orders).join(contents, on=ROW_NUMBER, maintain_order="left")
            found = keys.with_columns(place=_find(repeated, keys[_HASH])).group_by("place").agg(least, most)
            known = first.gather(found["place"]).fill_null(found["least"])
            suspects = suspects.append(found["place"].filter((known != found["least"]) | (known != found["most"])))
            first = first.scatter(found["place"], known)
        return repeated.gather(suspects.unique())

    def _reread(self, wanted: pl.Series) -> Iterator[CellBlock]:
        """再读一遍，只要这些订单号的行。"""
        for block in self._builder.source.reread():
            keys = _trim_and_hash(self._builder.read_numbers(block))
            rows = keys[ROW_NUMBER].filter(wanted.gather(_find(wanted, keys[_HASH])) == keys[_HASH])
            if rows.len():
                yield block.keep(rows)

    def _explain(self, suspects: pl.Series) -> ImportFileError | None:
        """读出这些订单的行，说出看到了什么；只是散列碰巧相同时是 None。"""
        builder = self._builder
        table, sample, bad = (pl.DataFrame() for _ in range(3))
        different = pl.DataFrame()
        for block in self._reread(suspects):
            read = builder.read_lines(block, builder.targets_by_line)
            bad = bad.vstack(merge_problems(read.problems))
            good = read.lines.join(bad, on=ROW_NUMBER, how="anti", maintain_order="left")
            keys = _trim_and_hash(good).join(
                block.cells.select(ROW_NUMBER, *self._compared), on=ROW_NUMBER, maintain_order="left"
            )
            table, sample = table.vstack(keys), sample.vstack(read.lines)
            if table.height > _SAMPLE_ROWS:
                different = _find_different(table, self._compared)
                if different.height:
                    break
                # 到这里为止每一单的各行都相同：各留一行就够了
                table = table.unique((_ID, _SHOP), keep="first", maintain_order=True)
                sample = sample.join(table, on=ROW_NUMBER, how="semi", maintain_order="left")
        different = different if different.height else _find_different(table, self._compared)
        if not different.height:
            return None
        return ImportFileError(builder.source.path, self._describe(different), advice=self._advise(sample, bad))

    def _describe(self, different: pl.DataFrame) -> str:
        columns = _differing_columns(different, self._compared)
        used = [name for name in columns if name in self._builder.mapping.used]
        names = used + [name for name in columns if name not in used]
        first = different.join(different.head(1), on=(_ID, _SHOP), how="semi", nulls_equal=True)
        return (
            f"{self.repeated:,} of {self.distinct:,} order numbers come{'' if self.repeated > 1 else 's'} in several lines that differ"
            f" in more than their status; one line per item? Order {shorten(first[_ID][0])} is in rows {_list(first[ROW_NUMBER])},"
            f" the columns that differ are {_list([repr(name) for name in names])}"
        )

    def _advise(self, sample: pl.DataFrame, bad: pl.DataFrame) -> str:
        builder = self._builder
        keys = trim_key(sample).rename(lambda name: f"key {name}")
        plan = builder.plan_items(sample.hstack(keys), keys.columns, bad)
        items = "; ".join(f"{column.column!r}: {column.taken}" for column in plan.columns)
        if plan.problem:
            items += (
                f"; but {shorten(plan.problem.value or '')} {plan.problem.problem}, so the profile has to say which"
            )
        return "\n".join(
            [
                "say what its lines are",
                f"  --lines-are-items    items of one order, to be made one: {items}",
                "  --profile FILE       the same, said column by column, for example:",
                *(f"      {line}" for line in self._profile_lines(plan.columns)),
                "  --newest-line-wins   versions of one order: the last line of each in the file is the order",
            ]
        )

    def _profile_lines(self, merged: Sequence[MergedColumn]) -> Iterator[str]:
        """现在的对应关系，写成一个合并各行的配置。"""
        mapping = self._builder.mapping
        by = dict.fromkeys(
            root for name in ORDER_KEY if name in mapping.sources for root in mapping.sources[name].meta.root_names()
        )
        yield "[group]"
        yield f"by = {to_toml([*by])}"
        yield "[orders]"
        how = {column.column: column.aggregate for column in merged}
        for name, target in mapping.targets.items():
            merging = target.model_copy(update={"aggregate": how.get(mapping.shown_column(name)) or "first"})
            yield f"{name} = {to_toml(merging.model_dump(exclude_none=True, exclude_defaults=True))}"

    def _ungrouped(self, different: pl.DataFrame) -> ImportFileError:
        first = different.join(different.head(1), on=(_ID, _SHOP), how="semi", nulls_equal=True)
        return ImportFileError(
            self._builder.source.path,
            f"[group] leaves order {shorten(first[_ID][0])} in several rows, they begin in {_list(first[ROW_NUMBER])}:"
            " what it groups by differs between its lines",
            advice="group by the column of the order number alone",
        )


def _find_compared(builder: OrderBuilder) -> list[str]:
    """订单号相同时，这些列不同就不是同一行的版本：除了订单号、店与状态的所有列，不管用不用。

    按 [group] 合好了的，比 raw_orders 的列。
    """
    if builder.merges:
        return [name for name in builder.mapping.targets if name not in (*ORDER_KEY, "order_status")]
    roots = {name: set(expression.meta.root_names()) for name, expression in builder.mapping.sources.items()}
    others = set().union(*(columns for name, columns in roots.items() if name not in (*ORDER_KEY, "order_status")))
    own = set().union(*(roots.get(name, set()) for name in (*ORDER_KEY, "order_status"))) - others
    return [name for name in builder.source.columns if name not in own]


def _hash(keys: pl.DataFrame) -> pl.Series:
    return keys.hash_rows()


def _hash_keys(rows: pl.Series, texts: pl.DataFrame) -> pl.DataFrame:
    """有订单号的行：行号、订单号、店与两者的散列；texts 修剪过了。"""
    if "order_id" not in texts.columns:
        return pl.DataFrame(schema=_KEYS)
    ids = texts["order_id"]
    keys = texts.select(name for name in ORDER_KEY if name in texts.columns)
    shop = keys["shop"] if "shop" in keys.columns else pl.Series([None], dtype=pl.String).new_from_index(0, ids.len())
    hashed = pl.DataFrame([rows, ids.alias(_ID), shop.alias(_SHOP), _hash(keys).alias(_HASH)])
    named = (ids != "").fill_null(value=False)
    return hashed if named.all() else hashed.filter(named)


def _find(wanted: pl.Series, hashes: pl.Series) -> pl.Series:
    """各在 wanted 的哪一处（没有的是别的一处）；wanted 排好了序，不必每块为它建一次表。"""
    return wanted.search_sorted(hashes).clip(upper_bound=wanted.len() - 1)


def _trim_and_hash(orders: pl.DataFrame) -> pl.DataFrame:
    return _hash_keys(orders[ROW_NUMBER], trim(orders, ORDER_KEY))


def _find_different(rows: pl.DataFrame, compared: list[str]) -> pl.DataFrame:
    """订单号相同、内容却不同的行，按行号排；没有内容可比就没有。"""
    if not compared or not rows.height:
        return rows.clear()
    content = rows.select(compared).hash_rows()
    hashed = rows.select(ROW_NUMBER, _ID, _SHOP, content=content)
    orders = hashed.group_by(_ID, _SHOP).agg(pl.col("content").min().alias("least"), pl.col("content").max())
    different = orders.filter(pl.col("least") < pl.col("content")).select(_ID, _SHOP)
    return rows.join(different, on=(_ID, _SHOP), how="semi", nulls_equal=True).sort(ROW_NUMBER)


def _differing_columns(different: pl.DataFrame, compared: list[str]) -> list[str]:
    kinds = different.group_by(_ID, _SHOP).agg(pl.col(compared).n_unique()).select(pl.col(compared).max())
    return [name for name in compared if kinds[name][0] > 1]


def _list(values: Any) -> str:
    shown = ", ".join(map(str, values[:_SHOWN]))
    return shown + (f" and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else "")
