"""raw_orders 的读取与逐行评判：范围之内的行、它的业务日、它被哪条规则拒收。"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.arrays import array, unnest
from etl_assets.core.business_day import (
    FIRST_DAY,
    LAST_DAY,
    DayRange,
    local_day,
    may_fall_off_days,
    may_fall_on_days,
    partition_range,
)
from etl_assets.core.etl_tables import rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_id_key, raw_orders, shop_configs, trimmed
from etl_assets.core.text import MAX_TEXT_LENGTH
from etl_assets.services.vectorized_queries import Upsert, read_frame, release_staging, stage_frame, upsert_staged

_REJECTED_UPSERT = Upsert(key=("target", "raw_id"))

IN_SCOPE = import_tasks.c.status == "completed"
IS_SETTLED = sa.or_(IN_SCOPE, import_tasks.c.status == "failed")
"""完成了，或者撤回了、没做成：不会再自己变。"""
_SHOPS = sa.select(shop_configs.c.shop_name.label("shop"), shop_configs.c.shop_id).where(
    shop_configs.c.shop_name.is_not(None)
)


def scope(settings: EtlSettings) -> sa.Subquery:
    """范围之内的原始行，一行一条记录，附上业务日。

    NaN 金额与分区之外的时刻在这里换成 NULL 加规则名，因为 Polars 的 Decimal 与 Datetime 装不下它们。
    """
    return _scope(settings.timezone, partition_range(settings))


@lru_cache(maxsize=8)
def _scope(timezone: str, partitions: DayRange) -> sa.Subquery:
    raw = raw_orders.c
    # OFFSET 0：不许规划器把它展开到每个用到的地方，一行只算一次
    of_row = (
        sa.select(local_day(raw.ordered_at, timezone).label("day")).correlate(raw_orders).offset(0).lateral("of_row")
    )
    day = of_row.c.day
    in_partitions = partitions.includes(day)
    time_rule = sa.case(
        (raw.ordered_at.is_(None), "missing_ordered_at"),
        (day.is_(None), "bad_ordered_at"),
        (sa.not_(in_partitions), "outside_partitions"),
    )
    # PostgreSQL 的 NaN 等于自己，所以这样比得出来；NULL 两边都不算
    is_number = raw.amount != sa.cast("NaN", sa.Numeric(14, 2))
    return (
        sa.select(
            *raw["raw_id", "import_id", "order_id", "shop", "customer_name", "order_type", "order_status"],
            sa.case((is_number, raw.amount)).label("amount"),
            sa.case((sa.not_(is_number), "bad_amount")).label("amount_rule"),
            raw.quantity,
            raw.ordered_at.label("raw_ordered_at"),
            sa.case((in_partitions, raw.ordered_at)).label("ordered_at"),
            day.label("day"),
            time_rule.label("time_rule"),
        )
        .join(import_tasks, import_tasks.c.import_id == raw.import_id)
        .join(of_row, sa.true())
        .where(IN_SCOPE)
        .subquery("raw_rows")
    )


def frame_columns(rows: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """`judge` 需要的列：除了只给索引用的那一列，全部。"""
    return [column for column in rows.c if column.name != "raw_ordered_at"]


def on_days(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    """SQL：行自己的业务日在 FIRST_DAY 到 LAST_DAY 之间。"""
    return sa.and_(may_fall_on_days(rows.c.raw_ordered_at), rows.c.day.between(FIRST_DAY, LAST_DAY))


def off_days(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    """SQL：行自己的业务日不在 FIRST_DAY 到 LAST_DAY 之间；没有业务日的不算。"""
    return sa.and_(may_fall_off_days(rows.c.raw_ordered_at), sa.not_(rows.c.day.between(FIRST_DAY, LAST_DAY)))


def of_orders(rows: sa.FromClause, order_ids: sa.BindParameter[Any], shops: sa.BindParameter[Any]) -> sa.Select[Any]:
    """语句：这些订单的全部版本，店名与单号一一对应；查找用的表达式与 raw_orders 的索引一致。"""
    order = unnest("named", order_id=order_ids, shop=shops)
    is_named = sa.and_(order_id_key(rows.c.order_id) == order.c.order_id, trimmed(rows.c.shop) == order.c.shop)
    return sa.select(*frame_columns(rows)).join(order, is_named)


def read_import_ranks(connection: sa.Connection, import_ids: pl.Series) -> pl.DataFrame:
    """这些导入，一行一次：import_id 与先后名次（按 completed_at，NULL 最旧，同时完成的名次相同）。

    名次只在这些导入之间、在同一个快照里有意义。
    """
    ranks = read_frame(connection, _IMPORT_RANKS, {"import_ids": import_ids.to_list()})
    return ranks.with_columns(pl.col("import_id").cast(import_ids.dtype))


def judge(rows: pl.DataFrame, shops: pl.DataFrame) -> pl.DataFrame:
    """逐行评判：修剪文字，空串当作没有，`rule` 是第一条命中的拒收规则，NULL 表示有效。

    输入一行一条原始记录（`frame_columns`，别的列原样带过），输出同样的行，加上 shop_id 与 `rule`，去掉 SQL 给的规则名。
    """
    text = [_clean(name) for name in ("order_id", "shop", "customer_name", "order_type", "order_status")]
    too_long = pl.max_horizontal(pl.col("order_id", "customer_name").str.len_chars()) > MAX_TEXT_LENGTH
    hits = {
        "missing_order_id": pl.col("order_id").is_null(),
        "missing_shop": pl.col("shop").is_null(),
        "unknown_shop": pl.col("shop_id").is_null(),
        "missing_customer_name": pl.col("customer_name").is_null(),
    }
    later_hits = {"negative_quantity": pl.col("quantity") < 0, "text_too_long": too_long}
    # 先后照 DOMAIN 第 3 节：一行犯了几条也只记第一条，账才一行算一次
    rule = pl.coalesce(
        *[pl.when(hit).then(pl.lit(name)) for name, hit in hits.items()],
        "time_rule",
        "amount_rule",
        *[pl.when(hit).then(pl.lit(name)) for name, hit in later_hits.items()],
    )
    known = rows.with_columns(text).join(shops, on="shop", how="left", maintain_order="left")
    return known.with_columns(rule=rule).drop("time_rule", "amount_rule")


def read_shops(connection: sa.Connection) -> pl.DataFrame:
    """`judge` 要的店铺：shop、shop_id。"""
    return read_frame(connection, _SHOPS)


def write_rejected(
    connection: sa.Connection, target: str, rejected: pl.DataFrame, covered: sa.ColumnElement[bool]
) -> int:
    """让 `covered` 范围内的拒收记录正好是这些行（列：raw_id、import_id、day、rule）；返回新添的行数。"""
    if rejected.is_empty():  # 几乎总是这样，不为空表去建暂存
        _forget_rejected(connection, target, covered)
        return 0
    frame = rejected.select(pl.lit(target).alias("target"), "raw_id", "import_id", "day", "rule")
    staging = stage_frame(connection, frame, name="staged_rejected", like=rejected_rows)
    kept = sa.select(staging.c.raw_id).where(staging.c.raw_id == rejected_rows.c.raw_id)
    connection.execute(sa.delete(rejected_rows).where(rejected_rows.c.target == target, covered, ~kept.exists()))
    written = upsert_staged(connection, staging, rejected_rows, _REJECTED_UPSERT, staged_rows=frame.height)
    release_staging(connection, staging)
    return written.inserted


def reject_rows_without_partition(connection: sa.Connection, settings: EtlSettings, import_ids: list[Any]) -> int:
    """记下这些导入中不属于任何分区的行：没有哪个分区的运行会读到它们。返回行数。

    同一批导入中已不在范围内的行（撤回的导入）随之删去。
    """
    ids = sa.cast(import_ids, sa.ARRAY(sa.Uuid))
    outside = sa.func.coalesce(~partition_range(settings).includes(rejected_rows.c.day), sa.true())
    covered = sa.and_(rejected_rows.c.import_id == sa.any_(ids), outside)
    without_day = _rows_without_day(scope(settings))
    if not connection.scalar(
        sa.select(without_day.exists()), {"import_ids": import_ids}
    ):  # 几乎总是这样：先问一声，省下读与评判
        _forget_rejected(connection, settings.target_schema, covered)
        return 0
    judged = judge(read_frame(connection, without_day, {"import_ids": import_ids}), read_shops(connection))
    write_rejected(connection, settings.target_schema, judged.filter(pl.col("rule").is_not_null()), covered)
    return judged.height


@lru_cache(maxsize=8)
def _rows_without_day(rows: sa.Subquery) -> sa.Select[Any]:
    ids = array("import_ids", sa.Uuid)
    return sa.select(*frame_columns(rows)).where(rows.c.import_id == sa.any_(ids), rows.c.time_rule.is_not(None))


def _forget_rejected(connection: sa.Connection, target: str, covered: sa.ColumnElement[bool]) -> None:
    connection.execute(sa.delete(rejected_rows).where(rejected_rows.c.target == target, covered))


def _clean(name: str) -> pl.Expr:
    stripped = pl.col(name).str.strip_chars()
    return pl.when(stripped != "").then(stripped).alias(name)


_IMPORT_RANKS = sa.select(
    import_tasks.c.import_id,
    sa.func.rank().over(order_by=import_tasks.c.completed_at.nulls_first()).label("import_rank"),
).where(import_tasks.c.import_id == sa.any_(array("import_ids", sa.Uuid)))
