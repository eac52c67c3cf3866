"""一个文件的订单在库里已有的版本：导入它会不会把更新的导出盖回去，它的订单后来又怎样了。

只看一个样本（MOST_ORDERS 个订单），所以文件再大、历史再长，也只多几条语句；少于这么多的全看。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import polars as pl
import sqlalchemy as sa

from bridge.imports.rules.errors import shorten
from etl_assets.core.etl_tables import imported_files
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.reports.lookups import is_served, order_lookup
from etl_assets.services.copy_out import read_frame
from etl_assets.services.figures import has_status, status_spellings
from etl_assets.services.raw_rows import IN_SCOPE, of_orders, read_import_ranks, scope

MOST_ORDERS = 20_000
_ORDERS_AT_ONCE = 2_000
_KEY = ["order_id", "shop"]
_VALUES = {"order_status": pl.String(), "amount": pl.Decimal(14, 2), "quantity": pl.Int32()}
_VERSION = pl.Schema({"order_id": pl.String(), "shop": pl.String(), **_VALUES})


@dataclass(frozen=True)
class TurnedBack:
    """这次导入盖回去的订单。

    :param orders: 看过的 looked_at 个订单里的几个。
    :param is_sample: 文件里还有别的订单，没有看。
    :param example: 其中一个的订单号；changes 是它变了的列与前后的值。
    :param import_id: 那个订单此前的版本所在的导入，是名为 name 的文件。
    """

    orders: int
    looked_at: int
    is_sample: bool
    example: str
    changes: dict[str, tuple[str, str]]
    import_id: UUID
    name: str
    completed_at: datetime

    def describe(self, settings: EtlSettings, *, is_done: bool) -> str:
        orders = f"{self.orders:,} order{'s' if self.orders > 1 else ''}" + (
            f" of {self.looked_at:,} looked at" if self.is_sample else ""
        )
        changes = ", ".join(f"{name} {before} → {after}" for name, (before, after) in self.changes.items())
        when = self.completed_at.astimezone(settings.zone)
        newer = f"{shorten(self.name)}, imported on {when:%Y-%m-%d %H:%M:%S} as {self.import_id}"
        way_out = " Then `etl withdraw` with the id of this import takes it back" if is_done else ""
        return (
            f"{orders} {'were' if is_done else 'would be'} turned back, such as {shorten(self.example)} ({changes}); "
            f"what they were came from {newer}: is this file an older export?{way_out}"
        )


class OrderSample:
    """文件里的订单的一个样本：按订单号的散列取，多了就取一半的一半；同一个订单的几行只留最后的。"""

    def __init__(self) -> None:
        self._share = 1
        self.orders = pl.DataFrame(schema=_VERSION)

    @property
    def is_partial(self) -> bool:
        return self._share > 1

    def add(self, orders: pl.DataFrame) -> None:
        absent = [pl.lit(None, dtype).alias(name) for name, dtype in _VERSION.items() if name not in orders.columns]
        block = clean(orders.filter(self._is_in_share()).with_columns(absent)).drop_nulls(_KEY)
        self.orders = pl.concat([self.orders, block]).unique(_KEY, keep="last", maintain_order=True)
        while self.orders.height > MOST_ORDERS:
            self._share *= 2
            self.orders = self.orders.filter(self._is_in_share())

    def _is_in_share(self) -> pl.Expr:
        return pl.col("order_id").str.strip_chars().hash() % self._share == 0 if self.is_partial else pl.lit(value=True)


def clean(orders: pl.DataFrame) -> pl.DataFrame:
    """文字修剪过，空串当作没有；列按 _VERSION 的次序。"""
    texts = [name for name, dtype in _VERSION.items() if dtype == pl.String]
    stripped = [
        pl.when(pl.col(name).str.strip_chars() != "").then(pl.col(name).str.strip_chars()).alias(name) for name in texts
    ]
    return orders.with_columns(stripped).select(pl.col(name).cast(dtype) for name, dtype in _VERSION.items())


def count_superseded(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> tuple[int, int] | None:
    """这次导入的订单里，有几个此刻以别的导入的版本为准，一共看了几个；没有索引就不看。"""
    connection.execute(_NO_SEQUENTIAL_SCAN)
    own = (
        sa.select(raw_orders.c.order_id, raw_orders.c.shop)
        .where(raw_orders.c.import_id == import_id)
        .limit(MOST_ORDERS)
    )
    sample = OrderSample()
    sample.add(read_frame(connection, own))
    if sample.orders.is_empty() or not is_served(connection, order_lookup()):
        return None
    versions = _read_versions(connection, settings, sample.orders)
    is_ours = pl.col("import_id") == str(import_id)
    superseded = _newest(versions).filter(~is_ours).join(versions.filter(is_ours), on=_KEY, how="semi")
    return superseded.height, sample.orders.height


def find_turned_back(
    connection: sa.Connection, settings: EtlSettings, sample: OrderSample, last_ordered_at: datetime | None
) -> TurnedBack | None:
    """在自己的导入完成之前问。以前的版本来自一个不比它早的导出（最后一单不早于它的），而它的更像旧的，才算盖回去。

    更像旧的：状态从终了的（取消、完成）回到别的，或者值与那个订单更早的一个版本一样。往前走的比往回走的多，就不是旧的导出。
    """
    if last_ordered_at is None or sample.orders.is_empty():
        return None
    connection.execute(_NO_SEQUENTIAL_SCAN)
    newer = _imports_that_reach(connection, last_ordered_at)
    if not newer or not is_served(connection, order_lookup()):
        return None
    versions = _read_versions(connection, settings, sample.orders)
    current = _newest(versions).filter(pl.col("import_id").is_in([str(import_id) for import_id in newer]))
    backward, forward = compare(sample.orders, current, versions, settings)
    if backward.height <= forward:
        return None
    example = backward.row(0, named=True)
    task = connection.execute(sa.select(import_tasks).where(import_tasks.c.import_id == example["import_id"])).one()
    return TurnedBack(
        orders=backward.height,
        looked_at=sample.orders.height,
        is_sample=sample.is_partial,
        example=example["order_id"],
        changes={
            name: (_shown(example[f"{name}_before"]), _shown(example[name]))
            for name in _VALUES
            if example[f"{name}_before"] != example[name]
        },
        import_id=task.import_id,
        name=task.source_name,
        completed_at=task.completed_at,
    )


def compare(
    orders: pl.DataFrame, current: pl.DataFrame, versions: pl.DataFrame, settings: EtlSettings
) -> tuple[pl.DataFrame, int]:
    """往回走的订单（新旧两样值，旧的带 _before），与往前走的有几个。

    :param current: 一行一个订单此刻的版本，versions 是它全部的版本。
    """
    final = (*settings.cancelled_statuses, *settings.completed_statuses)
    pairs = orders.join(current, on=_KEY, suffix="_before", maintain_order="left")
    changed = pairs.filter(pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_before")) for name in _VALUES))
    older = versions.join(current, on=[*_KEY, "raw_id"], how="anti")
    is_known = changed.join(older, on=[*_KEY, *_VALUES], how="semi", nulls_equal=True)["raw_id"].implode()
    marked = changed.with_columns(
        was_final=_is_final(changed["order_status_before"], final),
        is_final=_is_final(changed["order_status"], final),
        is_known=pl.col("raw_id").is_in(is_known),
    )
    backward = marked.filter(pl.col("is_known") | (pl.col("was_final") & ~pl.col("is_final")))
    forward = marked.filter(~pl.col("is_known") & ~pl.col("was_final") & pl.col("is_final"))
    return backward, forward.height


def _is_final(statuses: pl.Series, final: Sequence[str]) -> pl.Series:
    frame = statuses.alias("latest_status").to_frame()
    return frame.select(has_status(status_spellings(statuses), final)).to_series()


def _imports_that_reach(connection: sa.Connection, moment: datetime) -> Sequence[UUID]:
    """由文件来的、还在范围之内的导入，它的订单从这一刻之前到这一刻或之后。"""
    files = imported_files.c
    reaches = sa.and_(files.first_ordered_at <= moment, files.last_ordered_at >= moment)
    statement = (
        sa.select(files.import_id)
        .join(import_tasks, import_tasks.c.import_id == files.import_id)
        .where(reaches, IN_SCOPE)
    )
    return connection.scalars(statement).all()


def _read_versions(connection: sa.Connection, settings: EtlSettings, orders: pl.DataFrame) -> pl.DataFrame:
    """这些订单在范围之内的版本，一行一个：_VERSION 的列，import_id 与 raw_id；旧的在前。

    店还没有人认识的也算：它一认识，这些就是版本。别的规则会拒收的不算。
    """
    statement = of_orders(scope(settings), _ORDER_IDS, _SHOPS)
    names = orders.select(_KEY).unique(maintain_order=True)
    parts = [
        read_frame(
            connection, statement, {_ORDER_IDS.key: part["order_id"].to_list(), _SHOPS.key: part["shop"].to_list()}
        )
        for part in names.iter_slices(_ORDERS_AT_ONCE)
    ]
    found = pl.concat(parts).filter(pl.col("time_rule").is_null() & (pl.col("customer_name").str.strip_chars() != ""))
    versions = pl.concat([clean(found), found.select("import_id", "raw_id")], how="horizontal")
    ranks = read_import_ranks(connection, versions["import_id"].unique())
    return versions.join(ranks, on="import_id", how="left").sort("import_rank", "raw_id").drop("import_rank")


def _newest(versions: pl.DataFrame) -> pl.DataFrame:
    return versions.unique(_KEY, keep="last", maintain_order=True)


def _shown(value: Any) -> str:
    return "nothing" if value is None else shorten(value) if isinstance(value, str) else str(value)


# 只在这个事务里：没有统计的表（刚导入过许多行），规划器宁可整个读一遍
_NO_SEQUENTIAL_SCAN = sa.select(sa.func.set_config("enable_seqscan", "off", True))
_ORDER_IDS = sa.bindparam("order_ids", type_=sa.ARRAY(sa.Text))
_SHOPS = sa.bindparam("shops", type_=sa.ARRAY(sa.Text))
