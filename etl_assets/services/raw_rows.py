"""raw_orders 的读取与逐行评判：范围之内的行、它的业务日、它被哪条规则拒收。"""

from __future__ import annotations

from datetime import date
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange, local_day, may_fall_on, partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, rejected_rows, shop_configs, trimmed
from etl_assets.services.vectorized_queries import Upsert, read_frame, stage_frame, upsert_staged

MAX_TEXT_LENGTH = 500

IN_SCOPE = import_tasks.c.status == "completed"


def scope(settings: EtlSettings, *, condition: sa.ColumnElement[bool] = IN_SCOPE) -> sa.Subquery:
    """范围之内的原始行，一行一条记录：附上业务日、店铺 id 与导入的先后名次。

    名次按 completed_at，NULL 最旧；同名次再比 raw_id。NaN 金额与分区之外的时刻在这里换成 NULL 加标记，
    因为 Polars 的 Decimal 与 Datetime 装不下它们。
    """
    ranked = sa.select(
        import_tasks.c.import_id,
        sa.func.rank().over(order_by=import_tasks.c.completed_at.nulls_first()).label("import_rank"),
    ).where(condition)
    imports = ranked.subquery("imports")
    raw = raw_orders.c
    day = local_day(raw.ordered_at, settings.timezone)
    in_partitions = partition_range(settings).includes(day)
    not_a_number = sa.func.coalesce(raw.amount == sa.cast("NaN", sa.Numeric(14, 2)), sa.false())
    return (
        sa.select(
            raw.raw_id,
            raw.import_id,
            imports.c.import_rank,
            shop_configs.c.shop_id,
            raw.order_id,
            raw.shop,
            raw.customer_name,
            raw.order_type,
            raw.order_status,
            sa.case((~not_a_number, raw.amount)).label("amount"),
            not_a_number.label("amount_is_nan"),
            raw.quantity,
            raw.ordered_at.is_not(None).label("has_ordered_at"),
            sa.case((in_partitions, raw.ordered_at)).label("ordered_at"),
            day.label("day"),
            in_partitions.label("in_partitions"),
            trimmed(raw.order_id).label("trimmed_order_id"),
            trimmed(raw.shop).label("trimmed_shop"),
            raw.ordered_at.label("raw_ordered_at"),
        )
        .join(imports, imports.c.import_id == raw.import_id)
        .outerjoin(shop_configs, shop_configs.c.shop_name == trimmed(raw.shop))
        .subquery()
    )


def frame_columns(rows: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """`judge` 需要的列。"""
    names = (
        "raw_id", "import_id", "import_rank", "shop_id", "order_id", "shop", "customer_name", "order_type", "order_status",
        "amount", "amount_is_nan", "quantity", "has_ordered_at", "ordered_at", "day", "in_partitions",
    )  # fmt: skip
    return [rows.c[name] for name in names]


def on_days(rows: sa.FromClause, days: DayRange) -> sa.ColumnElement[bool]:
    """SQL：行自己的业务日在区间里。"""
    return sa.and_(may_fall_on(rows.c.raw_ordered_at, days), days.includes(rows.c.day))


def judge(rows: pl.DataFrame) -> pl.DataFrame:
    """逐行评判：修剪文字，空串当作没有，`rule` 是第一条命中的拒收规则，NULL 表示有效。

    输入一行一条原始记录（`frame_columns`），输出同样的行，加上 `rule`，去掉只有评判用得着的列。
    """
    text = [_clean(name) for name in ("order_id", "shop", "customer_name", "order_type", "order_status")]
    too_long = pl.max_horizontal(pl.col("order_id", "customer_name").str.len_chars()) > MAX_TEXT_LENGTH
    rules = {
        "missing_order_id": pl.col("order_id").is_null(),
        "missing_shop": pl.col("shop").is_null(),
        "unknown_shop": pl.col("shop_id").is_null(),
        "missing_customer_name": pl.col("customer_name").is_null(),
        "missing_ordered_at": ~pl.col("has_ordered_at"),
        "bad_ordered_at": pl.col("day").is_null(),
        "outside_partitions": ~pl.col("in_partitions").fill_null(value=False),
        "bad_amount": pl.col("amount_is_nan"),
        "negative_quantity": pl.col("quantity") < 0,
        "text_too_long": too_long,
    }
    first_hit = pl.coalesce(*[pl.when(hit).then(pl.lit(rule)) for rule, hit in rules.items()])
    return rows.with_columns(text).with_columns(rule=first_hit).drop("shop", "amount_is_nan", "has_ordered_at")


def write_rejected(connection: sa.Connection, target: str, rejected: pl.DataFrame, covered: sa.ColumnElement[bool]) -> None:
    """让 `covered` 范围内的拒收记录正好是这些行（列：raw_id、import_id、day、rule）。"""
    frame = rejected.select(pl.lit(target).alias("target"), "raw_id", "import_id", "day", "rule")
    staging = stage_frame(connection, frame, name="staged_rejected", like=rejected_rows)
    kept = sa.select(staging.c.raw_id).where(staging.c.raw_id == rejected_rows.c.raw_id)
    connection.execute(sa.delete(rejected_rows).where(rejected_rows.c.target == target, covered, ~kept.exists()))
    upsert_staged(connection, staging, rejected_rows, Upsert(key=("target", "raw_id")))
    staging.drop(connection)


def reject_rows_without_partition(connection: sa.Connection, settings: EtlSettings, import_ids: list[Any]) -> int:
    """记下这些导入中不属于任何分区的行：没有哪个分区的运行会读到它们。返回行数。

    同一批导入中已不在范围内的行（撤回的导入）随之删去。
    """
    rows = scope(settings)
    statement = sa.select(*frame_columns(rows)).where(rows.c.import_id.in_(import_ids), sa.func.coalesce(~rows.c.in_partitions, sa.true()))
    judged = judge(read_frame(connection, statement))
    partitions = partition_range(settings)
    outside = sa.func.coalesce(~partitions.includes(rejected_rows.c.day), sa.true())
    write_rejected(
        connection,
        settings.target_schema,
        judged.filter(pl.col("rule").is_not_null()),
        sa.and_(rejected_rows.c.import_id.in_(import_ids), outside),
    )
    return judged.height


def _clean(name: str) -> pl.Expr:
    stripped = pl.col(name).str.strip_chars()
    return pl.when(stripped != "").then(stripped).alias(name)


def closure_days(rows: pl.DataFrame) -> set[date]:
    """这些行所在的、分区之内的业务日。"""
    return set(rows.filter("in_partitions")["day"].unique().to_list())
